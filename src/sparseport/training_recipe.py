"""What the user asks of pruning, quantisation and fine-tuning, as checked data.

Defaults are those of the papers: LoRA rank 32, alpha 64, ranks 32, 24, 16 (Shears, arXiv 2404.10934; SQFT, arXiv
2410.03750), and LoNAS' ranks and widths (COLING 2024, table of LLaMA-7B).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ModelWrapValidatorHandler, model_validator

from sparseport.strict import Strict

Method = Literal["lora", "shears", "sqft", "sparse_peft", "qa_sparse_peft", "lonas"]
Modules = tuple[str, ...] | tuple[tuple[str, ...], ...]
"""Last parts of module names (`q_proj`); or lists of them, one list a group."""

ALL_LINEAR = "all-linear"
_QKV = ("q_proj", "k_proj", "v_proj")
# What a method's paper does otherwise than the fields' defaults.
_OF_METHOD: dict[str, dict[str, Any]] = {
    "shears": {"elastic_modules": (_QKV, ("up_proj",), ("down_proj",))},
    "sqft": {"learning_rate": 1e-4},
    "lonas": {
        "target_modules": (*_QKV, "gate_proj", "up_proj", "down_proj"),
        "elastic_modules": (_QKV, ("gate_proj", "up_proj")),
        "search_space": (32, 28),
        "widths": (1.0, 0.875, 0.75, 0.625, 0.5),
    },
}


def _descending(what: str, sizes: Sequence[float]) -> None:
    if any(left <= right for left, right in pairwise(sizes)) or (sizes and sizes[-1] <= 0):
        raise ValueError(f"{what} are numbers above 0, the largest first, each once")


def _ranks(ranks: tuple[int, ...]) -> tuple[int, ...]:
    _descending("ranks", ranks)
    return ranks


def _widths(widths: tuple[float, ...]) -> tuple[float, ...]:
    _descending("widths", widths)
    if any(width > 1 for width in widths) and any(width != int(width) for width in widths):
        raise ValueError("widths are all fractions of the layer (0 to 1), or all whole numbers of rows")
    return widths


def _heads(heads: tuple[int, ...]) -> tuple[int, ...]:
    _descending("heads", heads)
    return heads


def _modules(modules: Modules) -> Modules:
    flat = flat_modules(modules)
    if len(set(flat)) != len(flat):
        raise ValueError("a module is named twice")
    if any(not name or "." in name for name in flat) or any(not group for group in modules):
        raise ValueError(
            "modules are known by the last part of their names: q_proj, not model.layers.0.self_attn.q_proj"
        )
    return modules


def flat_modules(modules: Modules) -> tuple[str, ...]:
    """All names in one row."""
    return tuple(name for group in modules for name in ((group,) if isinstance(group, str) else group))


def _metric(name: str) -> str:
    if name not in ("wanda", "magnitude") and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise ValueError("metrics are wanda, magnitude, or a function as package.module:function")
    return name


class CalibrationRecipe(Strict):
    """Text that runs through the model while its layers are measured."""

    samples: int = Field(32, ge=1, description="calibration sequences")
    sequence_length: int = Field(128, ge=8, description="tokens per calibration sequence")
    calibration: Path | None = Field(
        None, description="text file, one document a line; without one, sentences of the package and of the task"
    )


class SparsifyRecipe(CalibrationRecipe):
    """One-shot pruning, by default Wanda's (arXiv 2306.11695)."""

    metric: Annotated[str, AfterValidator(_metric)] = Field(
        "wanda", description="wanda, magnitude, or a function of yours as package.module:function"
    )
    sparsity: float = Field(0.5, gt=0.0, lt=1.0, description="share of weights to prune in each row")
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"


class QuantizeRecipe(CalibrationRecipe):
    """INT4 quantisation of the sparse base; no pruned weight comes back."""

    method: Literal["rtn", "gptq"] = "rtn"
    symmetric: bool = False
    group_size: int = Field(64, ge=8)


class BlockEnds(Strict):
    """All decoder blocks but some at both ends."""

    all_but_first: int = Field(0, ge=0, description="blocks at the beginning that always stay")
    all_but_last: int = Field(0, ge=0, description="blocks at the end that always stay")


class FinetuneRecipe(Strict):
    """Fine-tuning of low-rank adapters, with or without neural low-rank adapter search (NLS).

    method  lora            dense base; merged
            shears          sparse base; the adapter is dense and stays beside it
            sqft            INT4 base of a sparse or dense model; the adapter is dense and stays beside it
            sparse_peft     sparse base; the adapter takes the base's mask; merged
            qa_sparse_peft  sparse base and its INT4 form; mask and INT4 grid; merged into INT4
            lonas           dense base; widths elastic beside ranks; merged

    With NLS a sub-network is sampled at each step: a size for each group of the search space. Groups repeat from
    decoder layer to decoder layer. Other defaults than the fields' own: shears and lonas have their papers' groups,
    lonas their ranks, widths and modules, sqft a learning rate of 1e-4.
    """

    method: Method = "qa_sparse_peft"
    task: str = Field("home-commands", description="home-commands, a task of a data set, or a JSONL file")
    data: Path | None = Field(None, description="folder of the data sets, for their tasks (arc-easy, gsm8k, ...)")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        (*_QKV, "up_proj", "down_proj"),
        min_length=1,
        description="modules with an adapter, by the last part of their names; all-linear: all in the decoder blocks",
    )
    nls: bool = Field(True, description="false: no search space; every adapter has the first rank")
    search_space: Annotated[tuple[int, ...], AfterValidator(_ranks)] = Field(
        (32, 24, 16), min_length=1, description="ranks, largest first"
    )
    elastic_modules: Annotated[Modules, AfterValidator(_modules)] = Field(
        _QKV, description="modules whose rank is elastic, all with one rank; or lists, each with a rank of its own"
    )
    rank_sharing: Literal["layer", "module"] = Field(
        "layer", description="a rank for each layer and list of elastic_modules, or for each module"
    )
    widths: Annotated[tuple[float, ...], AfterValidator(_widths)] = Field(
        (), description="rows of width_modules, largest first: fractions of the layer, or whole numbers; none: fixed"
    )
    width_modules: Annotated[Modules, AfterValidator(_modules)] = Field(
        ("gate_proj", "up_proj"), description="modules with one width, or lists, each with a width of its own"
    )
    width_multiple: int = Field(32, ge=1, description="widths are multiples of it, so that INT4 groups fit")
    heads: Annotated[tuple[int, ...], AfterValidator(_heads)] = Field(
        (), description="key-value heads of each layer, largest first, with the query heads that share them; none: all"
    )
    elastic_blocks: tuple[int, ...] | BlockEnds = Field(
        (), description="decoder blocks that may be left out: a list, or {all_but_first: N, all_but_last: M}"
    )
    removal_rate: float = Field(
        0.2, gt=0.0, lt=1.0, description="how often each elastic block is left out of a sampled sub-network"
    )
    alpha: float = Field(64.0, gt=0, description="scaling = alpha / largest rank, at every rank")
    dropout: float = Field(0.1, ge=0.0, lt=1.0, description="of the adapters' inputs")
    learning_rate: float = Field(3e-4, gt=0)
    steps: int = Field(100, ge=1)
    batch_size: int = Field(16, ge=1, description="items of a step, over all processes and microbatches")
    microbatches: int = Field(1, ge=1, description="parts of a step's batch, each with a sub-network of its own")
    warmup_steps: int = Field(10, ge=0)
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the model's arithmetic; adapters and merged weights are float32 always"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice, to need less memory")
    test_items: int = Field(200, ge=1, description="items of the test split to measure on")
    seed: int = 0

    @model_validator(mode="wrap")
    @classmethod
    def _with_defaults_of_method(cls, data: Any, handler: ModelWrapValidatorHandler[FinetuneRecipe]) -> FinetuneRecipe:
        more = _OF_METHOD.get(data.get("method", ""), {}) if isinstance(data, dict) else {}
        if not more or data.get("nls") is False:
            return handler(data)
        made = handler({**more, **data})
        made.model_fields_set.intersection_update(data)  # what the user wrote, and no more
        return made

    @model_validator(mode="after")
    def _options_belong_together(self) -> FinetuneRecipe:
        if not self.nls and (self.widths or self.heads or self.elastic_blocks):
            raise ValueError("widths, heads and elastic_blocks are a search space; leave them away, or set nls: true")
        if self.method == "lonas" and self.nls and not (self.widths or self.heads or self.elastic_blocks):
            raise ValueError("lonas without widths, heads and elastic_blocks is lora: give one of them, or lora")
        if self.microbatches > self.batch_size:
            raise ValueError("microbatches are parts of the batch; batch_size is at least as large")
        if self.target_modules != ALL_LINEAR and "elastic_modules" in self.model_fields_set and self.nls:
            strange = sorted(set(flat_modules(self.elastic_modules)) - set(self.target_modules))
            if strange:
                raise ValueError(f"elastic_modules names {', '.join(strange)}, which target_modules does not")
        return self

    @property
    def rank(self) -> int:
        """Rank of every adapter as trained, and of the super-adapter's file."""
        return self.search_space[0]
