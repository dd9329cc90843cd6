"""Measure sub-networks of a trained super-network: accuracy in torch, costs on shapes, latency of their exports.

The super-network is loaded once, and every sub-network is a view of its weights. Only a measured latency needs an
exported folder, which is made for each shape once and removed when it was measured.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseport import __version__
from sparseport.checkpoints.elastic import SearchSpace, Selection, open_search_space, select
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.paths import file_sha256
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.errors import BadInput, UsageError
from sparseport.merge.subnetwork import SubNetwork, sub_network
from sparseport.nls.activation import activate
from sparseport.nls.cost import Architecture, architecture_of, macs, parameters
from sparseport.nls.engines import TorchEngine
from sparseport.nls.evaluate import answers_torch
from sparseport.nls.latency import measure_latency
from sparseport.nls.load import load_for_training, restore_adapter
from sparseport.nls.scoring import mean, score_choices
from sparseport.nls.search.candidates import Candidate
from sparseport.nls.tasks import Example, MultipleChoice, Task, load_task
from sparseport.nls.tasks.answers import judge
from sparseport.recipe import FinetuneRecipe, Recipe
from sparseport.search_recipe import SearchRecipe

# Methods whose adapter stays beside the base, and adds to its cost.
UNMERGED = ("shears", "sqft")


@dataclass(frozen=True)
class SubNetworkEvaluator:
    """Makes an evaluator in the process that will use it; everything here crosses processes.

    base       the model that the adapter was trained on
    quantized  its INT4 form, for QA-SparsePEFT
    adapter    the super-adapter with its search space
    finetune   recipe that it was trained with
    search     objectives, items and metric
    export     how a sub-network is exported where its latency is measured; inputs and output are filled in
    """

    base: Path
    quantized: Path | None
    adapter: Path
    finetune: FinetuneRecipe
    search: SearchRecipe
    export: Recipe | None = None

    def __call__(self) -> Evaluator:
        """Load the super-network and the task."""
        return Evaluator(self)

    def space(self) -> SearchSpace:
        """The search space beside the adapter.

        Raises:
            BadInput: there is none.
        """
        with AdapterFolder.open(self.adapter) as adapter:
            file = adapter.search_space_file()
        if file is None:
            raise BadInput(
                "the adapter has no search space", where=self.adapter, fix="train with nls: true", code="E_ELASTIC"
            )
        with ModelFolder.open(self.base) as base:
            layers = base.config.get("num_hidden_layers")
        return open_search_space(file, layers=layers if isinstance(layers, int) else None)

    def digest(self) -> str:
        """SHA-256 of everything that decides what an evaluation yields: weights, data, settings, version."""
        folders = [folder for folder in (self.base, self.quantized, self.adapter) if folder is not None]
        files = [
            {
                path.name: file_sha256(path)
                for path in sorted(folder.iterdir())
                if path.suffix in (".safetensors", ".json")
            }
            for folder in folders
        ]
        task = _items(load_task(self.finetune.task, self.finetune.data), self.search)
        recipe = self.finetune.model_dump(mode="json", exclude={"data"})
        content = {
            "version": __version__,
            "files": files,
            "finetune": recipe,
            "items": hashlib.sha256(repr(task).encode()).hexdigest(),
            "metric": self.search.metric,
            "objectives": list(self.search.objectives),
            "tokens": self.search.tokens,
        }
        if self.export is not None and "latency" in self.search.objectives:
            paths = {"base", "sparse_base", "adapter", "output", "search_space", "sub_adapter"}
            content["export"] = self.export.model_dump(mode="json", exclude=paths)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class Evaluator:
    """Measures one sub-network after another; see `SubNetworkEvaluator`."""

    setup: SubNetworkEvaluator
    _latencies: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from transformers import AutoTokenizer

        setup = self.setup
        if "latency" in setup.search.objectives and setup.export is None:
            raise UsageError("a latency is measured on an export; the search needs an export recipe")
        self._space = setup.space()
        self._task = load_task(setup.finetune.task, setup.finetune.data)
        self._items = _items(self._task, setup.search)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(setup.quantized or setup.base)
        self._model = load_for_training(setup.base, setup.finetune, setup.quantized)
        restore_adapter(self._model, setup.adapter)
        self._model.eval()
        with ModelFolder.open(setup.base) as base:
            self._architecture = architecture_of(base)
            self._config = base.config

    def __call__(self, candidate: Candidate) -> Mapping[str, float]:
        """Objective -> value: accuracy 0..1, MACs per token (see `cost`), parameters, latency in seconds a token."""
        selection = select(self._space, candidate)
        values: dict[str, float] = {}
        objectives = self.setup.search.objectives
        if "accuracy" in objectives:
            activate(self._model, self._space, selection)
            try:
                values["accuracy"] = self._accuracy()
            finally:
                activate(self._model, self._space, Selection())
        small = self.architecture(selection)
        if "macs" in objectives:
            tokens = self.setup.search.tokens
            values["macs"] = macs(small, tokens, predicted=1).total / tokens
        if "parameters" in objectives:
            values["parameters"] = float(parameters(small))
        if "latency" in objectives:
            values["latency"] = self._latency(candidate, small)
        return values

    def architecture(self, selection: Selection) -> Architecture:
        """The shapes of a sub-network, its adapters beside it where they are not merged."""
        shapes = dict(self._architecture.linears)
        cut: SubNetwork | None = sub_network(selection, shapes, self._config, str(self.setup.base))
        whole = self._architecture
        if self.setup.finetune.method in UNMERGED:
            with AdapterFolder.open(self.setup.adapter) as adapter:
                whole = whole.with_branches({**adapter.ranks(), **selection.ranks})
        return whole if cut is None else whole.cut(cut)

    def _accuracy(self) -> float:
        if self._task.by_choice:
            items = [item for item in self._items if isinstance(item, MultipleChoice)]
            right = score_choices(TorchEngine(self._model), self._tokenizer, items).right
        else:
            examples = [item for item in self._items if isinstance(item, Example)]
            answers = answers_torch(
                self._model,
                self._tokenizer,
                examples,
                max_new_tokens=self._task.max_new_tokens,
                stop=self._task.stop,
            )
            right = judge(self._task.rule, answers, [item.answer for item in examples])
        metric = self.setup.search.metric or list(right)[-1]
        if metric not in right:
            raise UsageError("the task has no such metric", where=metric, expected=", ".join(right))
        return mean(right[metric])

    def _latency(self, candidate: Candidate, shapes: Architecture) -> float:
        """Seconds a token of the exported sub-network; sub-networks of the same shapes share one measurement."""
        from sparseport.pipeline import export

        key = repr((sorted(shapes.linears.items()), sorted(shapes.branches.items())))
        if key not in self._latencies:
            assert self.setup.export is not None
            with tempfile.TemporaryDirectory(prefix="sparseport-latency-") as name:
                chosen = Path(name) / "sizes.json"
                chosen.write_text(json.dumps(list(candidate)), encoding="utf-8")
                update = {
                    "sub_adapter": str(chosen),
                    "output": Path(name) / "out",
                    "tokenizer": False,
                    "numerics": False,
                }
                recipe = self.setup.export.model_copy(update=update)
                export(recipe)
                folder = recipe.folder_of(recipe.target[0], recipe.output)
                tokens = self.setup.search.tokens
                measured = measure_latency([folder], prompts=(tokens,))["folders"][0]
                self._latencies[key] = float(measured["decode_ms"][str(tokens)]["median"]) / 1e3
        return self._latencies[key]


def _items(task: Task, search: SearchRecipe) -> tuple[Example, ...] | tuple[MultipleChoice, ...]:
    """The validation items that a search measures on."""
    examples = task.examples(search.split)[: search.items]
    return task.choices[search.split][: len(examples)] if task.by_choice else examples
