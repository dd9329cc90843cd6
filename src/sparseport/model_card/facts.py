"""A certificate and a config.json as facts to print: layers with their place in the model, totals, measured logits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparseport.checkpoints.folder import EMBEDDINGS, natural
from sparseport.checkpoints.layers import layer_count
from sparseport.checkpoints.sub_config import block_of, in_whole_model, kept_blocks, whole_config
from sparseport.errors import SparseportError, VerificationError
from sparseport.verify.certificate import Certificate

_BITS = re.compile(r"(?:nncf )?[a-z]+(\d+)(?=\D|$)")
# A number from a file: no page is drawn for a model of millions of blocks.
_MOST_BLOCKS = 10_000
_DRIFT = ("kl", "max_abs", "top1")


@dataclass(frozen=True)
class Layer:
    """One linear layer.

    module    as in the written model
    shape     [out, in] as written
    whole     [out, in] in the model that a sub-network was cut from; else equal to `shape`
    block     number of its decoder block in the whole model; None outside of the blocks
    part      its path inside the block (`self_attn.q_proj`), or all of it
    rule      merge rule
    rank      of what was merged; None where nothing was
    stored    form on disk (`u4 g64`)
    bits      of one stored weight
    pruned    weights that the mask prunes; None where there is no mask
    revived   of these, how many are not zero
    beside    rank of an un-merged branch in the graph; None where there is none
    intact    read back from disk as it was merged
    """

    module: str
    shape: tuple[int, int]
    whole: tuple[int, int]
    block: int | None
    part: str
    rule: str
    rank: int | None
    stored: str
    bits: int
    pruned: int | None
    revived: int
    beside: int | None
    intact: bool

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float | None:
        """Share of pruned weights, 0 to 1; None without a mask."""
        return None if self.pruned is None else self.pruned / self.weights


@dataclass(frozen=True)
class Table:
    """An embedding, or another matrix that is no linear layer: name, shape, form on disk, values changed by storing."""

    name: str
    shape: tuple[int, ...]
    stored: str
    changed: int


@dataclass(frozen=True)
class Run:
    """Logits of one way to run the folder against the dequantised reference, in the certificate's own digits.

    label     `full_precision`, `default`, `fast`, `with adapter.safetensors`, ...
    allowed   largest difference that may be; None for runs that were only measured
    largest   largest difference found, against torch in `against`; None like `allowed`
    """

    label: str
    kl: str | None
    max_abs: str | None
    top1: str | None
    settings: dict[str, str]
    allowed: str | None = None
    largest: str | None = None
    against: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What one exported folder is.

    blocks    decoder blocks of the whole model, and `kept` the numbers of those that are there
    compress  NNCF mode of floating-point layers, or none
    adapters  file -> number of layers that it has branches for
    runs      measured logits; empty with --no-numerics
    sample    tokens that the logits were compared on
    chat      whether there is a chat template in a file of its own
    origin    see `model_card.origin`
    draft     whether it is the draft of a larger sub-network of the same super-network
    """

    target: str
    version: str
    model_type: str
    architecture: str
    layers: tuple[Layer, ...]
    tables: tuple[Table, ...]
    blocks: int
    kept: tuple[int, ...]
    compress: str
    adapters: dict[str, int]
    runs: tuple[Run, ...]
    sample: int
    tokenizer: bool
    chat: bool
    config: Mapping[str, Any]
    recipe: Mapping[str, Any]
    inputs: Mapping[str, Any]
    versions: Mapping[str, Any]
    origin: Mapping[str, Any]
    draft: bool

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def whole_weights(self) -> int | None:
        """Weights of the same layers in the model that a sub-network was cut from; None if blocks are gone too."""
        return None if self.cut_blocks else sum(layer.whole[0] * layer.whole[1] for layer in self.layers)

    @property
    def cut_blocks(self) -> int:
        """How many decoder blocks were left out."""
        return self.blocks - len(self.kept)

    @property
    def narrower(self) -> int:
        """How many layers have fewer rows or columns than in the whole model."""
        return sum(layer.shape != layer.whole for layer in self.layers)

    @property
    def pruned(self) -> int:
        return sum(layer.pruned or 0 for layer in self.layers)

    @property
    def revived(self) -> int:
        return sum(layer.revived for layer in self.layers)

    @property
    def masked(self) -> int:
        """Weights of the layers that have a mask."""
        return sum(layer.weights for layer in self.layers if layer.pruned is not None)

    @property
    def sparsity(self) -> float | None:
        """Share of pruned weights among those of layers with a mask; None if no layer has one."""
        return self.pruned / self.masked if self.masked else None

    @property
    def by_bits(self) -> dict[int, int]:
        """Bits of a stored weight -> layers, the fewest bits first."""
        return {
            bits: sum(layer.bits == bits for layer in self.layers) for bits in sorted({one.bits for one in self.layers})
        }

    @property
    def rules(self) -> dict[str, int]:
        """Merge rule -> layers."""
        return {
            rule: sum(layer.rule == rule for layer in self.layers) for rule in sorted({one.rule for one in self.layers})
        }


def model_facts(certificate: Certificate, config: Mapping[str, Any]) -> ModelFacts:
    """The facts of a certificate, checked: whoever may write a folder may also seal a certificate anew.

    Args:
        certificate: of the folder.
        config: its config.json.

    Raises:
        VerificationError: an entry has another type than a certificate's, or totals are not those of the layers.
    """
    body, where = certificate.body, "sparseport.json"
    try:
        kept = kept_blocks(config)
        layers = tuple(
            _layer(module, certificate.linears[module], certificate.target, kept)
            for module in sorted(certificate.linears, key=natural)
        )
        facts = ModelFacts(
            certificate.target,
            _text(body["sparseport"]),
            _text(config.get("model_type", "")),
            ", ".join(map(_text, config.get("architectures") or ())),
            layers,
            _tables(certificate),
            *_blocks(layers, kept, config),
            _text(_mapping(body.get("recipe", {})).get("compress", {}).get("mode", "none")),
            {file: len(branches) for file, branches in sorted(certificate.adapters.items())},
            _runs(body.get("numerics", {})),
            _count(body.get("numerics", {}).get("tokens", 0)),
            "tokenizer.json" in certificate.files or "tokenizer.model" in certificate.files,
            "chat_template.jinja" in certificate.files,
            config,
            _mapping(body.get("recipe", {})),
            _mapping(body.get("inputs", {})),
            _mapping(body.get("versions", {})),
            _mapping(body.get("origin", {})),
            certificate.draft is not None,
        )
    except SparseportError as error:
        raise VerificationError(error.what, where=error.where or where, found=error.found) from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"[:80]
        raise VerificationError("the certificate's entry is of another type", where=where, found=found) from error
    totals = certificate.totals
    sums = {"linears": len(layers), "weights": facts.weights, "pruned": facts.pruned, "revived": facts.revived}
    for name, value in sums.items():
        if totals[name] != value:
            raise VerificationError(
                "the certificate's totals are not those of its layers",
                where=f"{where}, totals, {name}",
                expected=value,
                found=totals[name],
            )
    return facts


def _blocks(
    layers: Sequence[Layer], kept: tuple[int, ...] | None, config: Mapping[str, Any]
) -> tuple[int, tuple[int, ...]]:
    """How many blocks the whole model has, and the numbers of those that are there."""
    there = tuple(sorted({layer.block for layer in layers if layer.block is not None}))
    if kept is None:
        return len(there), there
    whole = layer_count(whole_config(config)) or 0
    if there != kept or not kept[-1] < whole <= _MOST_BLOCKS:
        raise ValueError(f"{whole} blocks in the whole model")
    return whole, kept


def _layer(module: str, facts: Mapping[str, Any], target: str, kept: tuple[int, ...] | None) -> Layer:
    rows, columns = facts["shape"]
    whole_rows, whole_columns = map(_count, facts.get("whole_shape", (rows, columns)))
    if not (1 <= rows <= whole_rows and 1 <= columns <= whole_columns):
        raise ValueError(f"shape {rows}x{columns} of {whole_rows}x{whole_columns}")
    whole_name = in_whole_model(module, kept)
    block = block_of(whole_name)
    stored = _text(facts["stored"])
    bits = _BITS.match(stored)
    if bits is None:
        raise ValueError(f"stored as {stored[:40]}")
    rank, pruned, branch = facts.get("rank"), facts.get("pruned"), facts.get("branch")
    return Layer(
        module,
        (rows, columns),
        (whole_rows, whole_columns),
        block,
        module if block is None else _inside(whole_name, block),
        _text(facts["rule"]),
        None if rank is None else _count(rank),
        stored,
        int(bits[1]),
        None if pruned is None else _count(pruned),
        _count(facts.get("revived", 0)),
        None if branch is None else _count(branch["rank"]),
        facts["readback"][target] == facts.get("compressed_sha256", facts["weight_sha256"]),
    )


def _inside(name: str, block: int) -> str:
    """What stands behind the block's number; numbers of experts are all called `*`."""
    rest = name.split(".")[name.split(".").index(str(block)) + 1 :]
    return ".".join("*" if part.isdecimal() else part for part in rest) or name


def _tables(certificate: Certificate) -> tuple[Table, ...]:
    """Matrices beside the linear layers; how they are stored stands in the recipe, or with them if they have codes."""
    recipe = certificate.body.get("recipe", {})
    tables = []
    for name, facts in sorted(certificate.tensors.items()):
        if len(facts["shape"]) < 2:
            continue
        stored = _text(facts["stored"]) if "stored" in facts else _dtype(facts, recipe, name)
        tables.append(Table(name, tuple(facts["shape"]), stored, _count(facts.get("changed", 0))))
    return tuple(tables)


def _dtype(facts: Mapping[str, Any], recipe: Mapping[str, Any], name: str) -> str:
    if any(part in EMBEDDINGS or part == "lm_head" for part in name.split(".")):
        return {"fp16": "f16", "fp32": "f32"}.get(recipe.get("embedding", "fp16"), "as its source")
    return _text(facts.get("source_dtype", "as its source"))


def _runs(numerics: Mapping[str, Any]) -> tuple[Run, ...]:
    """The measured runs: full precision first, default settings next, then by name."""
    order = {"full_precision": 0, "default": 1}
    labels = [label for label, run in numerics.items() if isinstance(run, dict)]
    return tuple(_run(label, numerics[label]) for label in sorted(labels, key=lambda one: (order.get(one, 2), one)))


def _run(label: str, run: Mapping[str, Any]) -> Run:
    settings = {_text(key): _text(value) for key, value in sorted(_mapping(run.get("settings", {})).items())}
    kl, max_abs, top1 = (_decimal(run.get(key)) for key in _DRIFT)
    allowed, largest = _decimal(run.get("allowed")), _decimal(run.get("judged_max_abs"))
    against = run.get("judged_against")
    return Run(label, kl, max_abs, top1, settings, allowed, largest, None if against is None else _text(against))


def _decimal(value: object) -> str | None:
    """A decimal string of a finite number that is not below 0."""
    if value is None:
        return None
    if not 0 <= float(_text(value)) < float("inf"):
        raise ValueError(f"no measured value: {value}")
    return _text(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"not a text: {value!r}"[:60])
    return value


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"not a count: {value!r}"[:60])
    return value


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"not a mapping: {value!r}"[:60])
    return value
