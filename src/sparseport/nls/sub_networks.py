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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparseport import __version__
from sparseport.checkpoints.elastic import SearchSpace, Selection, open_search_space, select
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.layers import layer_count
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.errors import BadInput, UsageError
from sparseport.extras import require_packages
from sparseport.machine import processor
from sparseport.merge.subnetwork import sub_network
from sparseport.nls.activation import activate
from sparseport.nls.cost import Architecture, architecture_of, macs, parameters
from sparseport.nls.engines import TorchEngine
from sparseport.nls.evaluate import answers_torch
from sparseport.nls.latency import measure_latency
from sparseport.nls.load import check_adapter, load_for_training, restore_adapter
from sparseport.nls.scoring import check_metric, mean, score_choices
from sparseport.nls.search.candidates import Candidate
from sparseport.nls.search.objectives import ACCURACY
from sparseport.nls.tasks import Example, MultipleChoice, Task, load_task
from sparseport.nls.tasks.answers import judge
from sparseport.nls.team import Team
from sparseport.recipe import FinetuneRecipe, Recipe
from sparseport.search_recipe import SearchRecipe

# Methods whose adapter stays beside the base, and adds to its cost.
UNMERGED = ("shears", "sqft")
# Distributions that make and run an exported graph, by target.
_RUNTIMES = {"openvino": ("openvino", "optimum-intel"), "onnx": ("onnxruntime", "onnxruntime-genai")}
# Of a measured latency: as many as the runtime chooses.
_THREADS = 0


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
            return open_search_space(file, layers=layer_count(base.config))

    def check(self) -> None:
        """Refuse what would fail later; config files and headers are read, no weights.

        Raises:
            BadInput: there is no search space, or the adapter was not trained with the recipe's method.
            UsageError: the task has no items to measure on or no such metric, or a latency has no export recipe.
            Unsupported: the shapes of this architecture, which the costs are counted on, cannot be told.
            EnvironmentProblem: packages of the target whose latency is measured are missing.
        """
        task = load_task(self.finetune.task, self.finetune.data)
        check_metric(task, self.search)
        _items(task, self.search)
        check_adapter(self.adapter, self.finetune.method)
        self.space()
        if self._costs():
            self.architecture()
        if "latency" in self.search.objectives:
            require_packages(self.measured_export().target)

    def architecture(self) -> Architecture | None:
        """The shapes of the whole model, None if no objective counts on them.

        Raises:
            Unsupported: they cannot be told for this architecture.
        """
        if not self._costs():
            return None
        with ModelFolder.open(self.base) as base:
            return architecture_of(base)

    def digest(self) -> str:
        """SHA-256 of everything that decides what an evaluation yields.

        That is the content of the folders (weights, configs, tokenizer, search space), the items and how they are
        judged, the recipes, and the versions of what computes; for a latency the machine and the runtime as well.
        """
        with ModelFolder.open(self.base) as base, AdapterFolder.open(self.adapter) as adapter:
            files = [base.sha256(), adapter.sha256()]
        if self.quantized is not None:
            with ModelFolder.open(self.quantized) as quantized:
                files.append(quantized.sha256())
        task = load_task(self.finetune.task, self.finetune.data)
        content = {
            "files": files,
            "finetune": self.finetune.model_dump(mode="json", exclude={"data", "task", "test_items"}),
            "items": hashlib.sha256(repr(_items(task, self.search)).encode()).hexdigest(),
            "answers": [task.rule, task.max_new_tokens, list(task.stop)],
            "metric": check_metric(task, self.search),
            "objectives": list(self.search.objectives),
            "tokens": self.search.tokens,
            "versions": {"sparseport": __version__, **_versions(("torch", "transformers"))},
        }
        if "latency" in self.search.objectives:
            recipe = self.measured_export()
            places = {"base", "sparse_base", "adapter", "output", "search_space", "sub_adapter"}
            content["export"] = recipe.model_dump(mode="json", exclude=places)
            content["machine"] = {**processor(), "threads": _THREADS, **_versions(_RUNTIMES[recipe.target[0]])}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def measured_export(self) -> Recipe:
        """The export whose latency is measured: un-merged branches stand in the graph, where their rank costs time.

        Raises:
            UsageError: there is no export recipe.
        """
        if self.export is None:
            raise UsageError("a latency is measured on an export; the search needs an export recipe")
        branches = "graph" if self.finetune.method in UNMERGED else self.export.branches
        update = {"branches": branches, "target": self.export.target[:1], "tokenizer": False, "numerics": False}
        return self.export.model_copy(update=update)

    def _costs(self) -> bool:
        return self.search.objectives != (ACCURACY,)


@dataclass
class Evaluator:
    """Measures one sub-network after another; see `SubNetworkEvaluator`."""

    setup: SubNetworkEvaluator
    _latencies: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from transformers import AutoTokenizer

        setup = self.setup
        setup.check()
        self._space = setup.space()
        self._task = load_task(setup.finetune.task, setup.finetune.data)
        self._items = _items(self._task, setup.search)
        self._metric = check_metric(self._task, setup.search)
        self._architecture = setup.architecture()
        with ModelFolder.open(setup.base) as base:
            self._config = base.config
        self._tokenizer: Any = AutoTokenizer.from_pretrained(setup.quantized or setup.base)
        self._model = load_for_training(setup.base, setup.finetune, setup.quantized)
        restore_adapter(self._model, setup.adapter)
        self._model.eval().to(Team().device)

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
        if self._architecture is None:
            return values
        small = self._shapes(self._architecture, selection)
        if "macs" in objectives:
            tokens = self.setup.search.tokens
            values["macs"] = macs(small, tokens, predicted=1).total / tokens
        if "parameters" in objectives:
            values["parameters"] = float(parameters(small))
        if "latency" in objectives:
            values["latency"] = self._latency(candidate, small)
        return values

    def _shapes(self, whole: Architecture, selection: Selection) -> Architecture:
        """The shapes of a sub-network, its adapters beside it where they are not merged."""
        cut = sub_network(selection, dict(whole.linears), self._config, str(self.setup.base))
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
        return mean(right[self._metric])

    def _latency(self, candidate: Candidate, shapes: Architecture) -> float:
        """Seconds a token of the exported sub-network; sub-networks of the same shapes share one measurement."""
        from sparseport.pipeline import export

        key = repr((sorted(shapes.linears.items()), sorted(shapes.branches.items())))
        if key not in self._latencies:
            with tempfile.TemporaryDirectory(prefix="sparseport-latency-") as name:
                chosen = Path(name) / "sizes.json"
                chosen.write_text(json.dumps(list(candidate)), encoding="utf-8")
                update = {"sub_adapter": str(chosen), "output": Path(name) / "out"}
                recipe = self.setup.measured_export().model_copy(update=update)
                export(recipe)
                tokens = self.setup.search.tokens
                measured = measure_latency([recipe.output], prompts=(tokens,), threads=_THREADS)["folders"][0]
                self._latencies[key] = float(measured["decode_ms"][str(tokens)]["median"]) / 1e3
        return self._latencies[key]


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {name: version(name) for name in packages}


def _items(task: Task, search: SearchRecipe) -> tuple[Example, ...] | tuple[MultipleChoice, ...]:
    """The validation items that a search measures on."""
    examples = task.examples(search.split)[: search.items]
    return task.choices[search.split][: len(examples)] if task.by_choice else examples
