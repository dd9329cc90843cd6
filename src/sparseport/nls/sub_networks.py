"""Measure sub-networks of a trained super-network: accuracy in torch, costs on shapes, latency of their exports.

The super-network is loaded once, and every sub-network is a view of its weights. Only a measured latency needs an
exported folder, which is made for each shape once and removed when it was measured.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparseport import __version__
from sparseport.checkpoints.elastic import CHOICES, SearchSpace, Selection, choose, open_search_space, select
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.layers import layer_count
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.errors import BadInput, UsageError
from sparseport.extras import require_packages
from sparseport.machine import processor
from sparseport.merge.subnetwork import sub_network
from sparseport.nls.activation import activate
from sparseport.nls.cost import Architecture, architecture_of, macs, parameters
from sparseport.nls.drafting import agreements_torch
from sparseport.nls.encoding import encode_prompt
from sparseport.nls.engines import TorchEngine
from sparseport.nls.evaluate import answers_torch, tokens_torch
from sparseport.nls.latency import measure_latency
from sparseport.nls.load import check_adapter, load_for_training, restore_adapter
from sparseport.nls.measured_exports import Latency, MainNetwork, exported
from sparseport.nls.scoring import check_metric, mean, score_choices
from sparseport.nls.search.candidates import Candidate
from sparseport.nls.search.objectives import ACCURACY
from sparseport.nls.speculation import acceptance, best_length
from sparseport.nls.tasks import Example, MultipleChoice, Task, load_task
from sparseport.nls.tasks.answers import judge
from sparseport.nls.team import Team
from sparseport.recipe import CompressionRecipe, FinetuneRecipe, Recipe
from sparseport.search_recipe import TIMED, SearchRecipe

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
        if self._timed():
            require_packages(self.measured_export().target)
        if self.search.drafts:
            self.main()

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
        if self.search.drafts:
            content["main"] = repr(sorted(vars(self.main()).items(), key=str))
            content["drafting"] = [self.search.answer_tokens, self.search.assistant_tokens]
        if self._timed():
            recipe = self.measured_export()
            places = {"base", "sparse_base", "adapter", "output", "search_space", "sub_adapter"}
            content["export"] = recipe.model_dump(mode="json", exclude={*places, "draft", "draft_compress"})
            if self.search.drafts:
                content["main_compress"] = self.main_export().compress.model_dump(mode="json")
            content["machine"] = {**processor(), "threads": _THREADS, **_versions(_RUNTIMES[recipe.target[0]])}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def measured_export(self) -> Recipe:
        """The export whose latency is measured: un-merged branches stand in the graph, where their rank costs time.

        A draft is compressed as the export's draft is.

        Raises:
            UsageError: there is no export recipe.
        """
        recipe = self.main_export()
        assert self.export is not None
        return recipe.model_copy(update={"compress": self.export.draft_compress}) if self.search.drafts else recipe

    def main_export(self) -> Recipe:
        """The same export of the main network, in a search for its draft.

        Raises:
            UsageError: there is no export recipe.
        """
        if self.export is None:
            raise UsageError("a latency is measured on an export; the search needs an export recipe")
        branches = "graph" if self.finetune.method in UNMERGED else self.export.branches
        update = {"branches": branches, "target": self.export.target[:1], "tokenizer": False, "numerics": False}
        alone = {"draft": None, "draft_compress": CompressionRecipe()}
        return self.export.model_copy(update={**update, **alone})

    def main(self) -> Selection:
        """The main network of a draft: the sub-network that the export recipe names, else the whole super-network.

        Raises:
            BadInput: the recipe's file is no list of sizes of this search space.
        """
        choice: str | Path = "maximal" if self.export is None else self.export.sub_adapter
        return choose(self.space(), choice if choice in CHOICES else Path(choice))

    def _timed(self) -> bool:
        return any(name in TIMED for name in self.search.objectives)

    def _costs(self) -> bool:
        return bool({*self.search.objectives} - {ACCURACY, "acceptance"})


@dataclass
class Evaluator:
    """Measures one sub-network after another; see `SubNetworkEvaluator`."""

    setup: SubNetworkEvaluator
    _latencies: dict[str, Latency] = field(default_factory=dict)

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
        self._answers = self._main_answers() if setup.search.drafts else ([], [])
        self._main = (
            MainNetwork(setup.main_export(), setup.search, _THREADS)
            if "speculation" in setup.search.objectives
            else None
        )

    def __call__(self, candidate: Candidate) -> Mapping[str, float]:
        """Objective -> value: accuracy 0..1, MACs per token (see `cost`), parameters, latency in seconds a token.

        Of a draft: acceptance 0..1, and the predicted speed-up with the best number of tokens to draft.
        """
        selection = select(self._space, candidate)
        values: dict[str, float] = {}
        objectives = self.setup.search.objectives
        agreements: list[list[bool]] = []
        with self._active(selection):
            if "accuracy" in objectives:
                values["accuracy"] = self._accuracy()
            if self.setup.search.drafts:
                agreements = agreements_torch(self._model, *self._answers)
        if "acceptance" in objectives:
            values["acceptance"] = acceptance(agreements)
        if self._architecture is None:
            return values
        small = self._shapes(self._architecture, selection)
        if "macs" in objectives:
            tokens = self.setup.search.tokens
            values["macs"] = macs(small, tokens, predicted=1).total / tokens
        if "parameters" in objectives:
            values["parameters"] = float(parameters(small))
        if "latency" in objectives:
            values["latency"] = self._latency(candidate, small).seconds
        if self._main is not None:
            ratio = self._latency(candidate, small).ratio
            assert ratio is not None
            _, values["speculation"] = best_length(agreements, ratio, self._main.verify)
        return values

    @contextmanager
    def _active(self, selection: Selection) -> Iterator[None]:
        """The model as one of its sub-networks, and whole again afterwards."""
        activate(self._model, self._space, selection)
        try:
            yield
        finally:
            activate(self._model, self._space, Selection())

    def _main_answers(self) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts, and the greedy answers of the main network that drafts are compared with.

        Raises:
            BadInput: every answer ends at its first token.
        """
        examples = self._task.examples(self.setup.search.split)[: self.setup.search.items]
        prompts = [encode_prompt(self._tokenizer, example) for example in examples]
        tokens = self.setup.search.answer_tokens
        with self._active(self.setup.main()):
            answers = tokens_torch(self._model, self._tokenizer, prompts, max_new_tokens=tokens)
        if max(map(len, answers)) < 2:
            raise BadInput(
                "no answer of the main network has a second token, which a draft could say", where=self._task.name
            )
        return prompts, answers

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

    def _latency(self, candidate: Candidate, shapes: Architecture) -> Latency:
        """Seconds a token of the exported sub-network; sub-networks of the same shapes share one measurement."""
        key = repr((sorted(shapes.linears.items()), sorted(shapes.branches.items())))
        if key not in self._latencies:
            with tempfile.TemporaryDirectory(prefix="sparseport-latency-") as name:
                folder = exported(self.setup.measured_export(), list(candidate), Path(name))
                first = [] if self._main is None else [self._main.folder]
                tokens = self.setup.search.tokens
                measured = measure_latency([*first, folder], prompts=(tokens,), threads=_THREADS)["folders"][-1]
                found = measured["decode_ms"][str(tokens)]
                ratio = float(found["ratio"]) if first else None
                self._latencies[key] = Latency(float(found["median"]) / 1e3, ratio)
        return self._latencies[key]


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {name: version(name) for name in packages}


def _items(task: Task, search: SearchRecipe) -> tuple[Example, ...] | tuple[MultipleChoice, ...]:
    """The validation items that a search measures on."""
    examples = task.examples(search.split)[: search.items]
    return task.choices[search.split][: len(examples)] if task.by_choice else examples
