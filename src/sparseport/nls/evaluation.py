"""Evaluate a checkpoint or an exported folder on a task, and compare runs of the same items one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sparseport.checkpoints.sub_config import in_whole_model, kept_blocks
from sparseport.errors import BadInput, UsageError
from sparseport.nls.adapters import active_adapter, no_switch
from sparseport.nls.encoding import encode_prompt
from sparseport.nls.engines import Engine, Precision, TorchEngine, folder_length, session_engine
from sparseport.nls.evaluate import answers_onnx, answers_openvino, answers_torch
from sparseport.nls.reference import load_merged
from sparseport.nls.scoring import Outcome, agreement, digest_of, score_choices
from sparseport.nls.tasks import Example, Split, Task
from sparseport.nls.tasks.answers import judge
from sparseport.progress import Progress, Step
from sparseport.recipe import make_recipe
from sparseport.targets.empty_model import read_settings
from sparseport.targets.read_back import open_reader
from sparseport.targets.tokenizer_files import load_tokenizer
from sparseport.verify.branched import attach
from sparseport.verify.numerics import reference_of
from sparseport.verify.runs import OPENVINO_FULL_PRECISION

EngineName = Literal["torch", "openvino", "onnx"]
_MODELS: dict[EngineName, str] = {"openvino": "openvino_model.xml", "onnx": "model.onnx"}


@dataclass(frozen=True)
class Evaluation:
    """One run of a task.

    path       checkpoint or exported folder
    engine     what computed it
    precision  `default` as applications run it, or `full`; torch always computes in float32
    settings   what was set for it
    adapter    file of the adapter that was switched on; None for none
    task       its name
    split      which items
    left_out   items of the task's files that are in no split: reason -> how many
    outcome    what came out, item by item
    """

    path: str
    engine: EngineName
    precision: Precision
    settings: Mapping[str, str]
    adapter: str | None
    task: str
    split: Split
    left_out: Mapping[str, int]
    outcome: Outcome

    def as_dict(self) -> dict[str, Any]:
        """The run as plain data; `records` has one entry per item."""
        outcome = self.outcome
        names = list(outcome.right)
        records: list[dict[str, Any]] = [
            {name: {"answer": outcome.predictions[name][index], "right": outcome.right[name][index]} for name in names}
            for index in range(len(outcome.right[names[0]]))
        ]
        for record, values in zip(records, outcome.loglikelihoods, strict=False):
            record["loglikelihoods"] = list(values)
        return {
            "path": self.path,
            "engine": self.engine,
            "precision": self.precision,
            "settings": dict(self.settings),
            "adapter": self.adapter,
            "task": self.task,
            "split": self.split,
            "items": len(records),
            "items_sha256": outcome.items,
            "left_out": dict(self.left_out),
            "truncated": outcome.truncated,
            "metrics": outcome.metrics(),
            "records": records,
        }


def evaluate(
    path: Path | str,
    task: Task,
    *,
    split: Split = "test",
    limit: int | None = None,
    engine: EngineName | None = None,
    precision: Precision = "default",
    adapter: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run a task on a model.

    Args:
        path: a checkpoint in any format that exports, or an exported folder.
        task: from `load_task`.
        split: `validation` for choosing, `test` for the figure that is reported.
        limit: only so many items, the first ones; None takes all.
        engine: None takes the runtime that a folder was exported for, and torch for a checkpoint. torch runs an
            exported folder too: the weights are read back from it and dequantised to float32.
        precision: for runtimes; see `sparseport.nls.engines.Precision`.
        adapter: file of an adapter beside an exported base, to switch on, or `none`; None takes the one that is there.
        progress: where to report; quiet by default.

    Returns:
        The metrics, and what came out item by item.

    Raises:
        UsageError: the engine does not run what is there, the split is empty, the limit is below 1, or the folder has
            no such adapter, or several and none was chosen.
        BadInput: nothing to evaluate is there, or it is damaged.
        Unsupported: the runtime cannot switch the adapter on for this task.
    """
    path = Path(path)
    chosen = engine_of(path, engine)
    active = adapter_for(path, task, chosen, adapter)
    items = task.examples(split)
    if limit is not None and limit < 1:
        raise UsageError("a limit is 1 or more", where="--limit", found=limit)
    if chosen == "onnx" and precision == "full" and not task.by_choice:
        raise UsageError(
            "onnxruntime-genai runs a folder as it was written",
            where=path,
            fix="leave --precision away; an export with --onnx-accuracy exact has full precision by default",
        )
    items = items[:limit]
    progress = progress or Progress("quiet")
    with progress.task(f"loading {path.name}"):
        tokenizer = load_tokenizer(path)
        model = load_torch(path, active) if chosen == "torch" else None
    if task.by_choice:
        runner: Engine = session_engine(path, precision, active) if model is None else TorchEngine(model)
        settings = runner.settings
        with progress.task(f"choosing: {path.name}, {chosen}", len(items)) as step:
            outcome = score_choices(runner, tokenizer, task.choices[split][: len(items)], step)
    else:
        _require_room(path, tokenizer, items, task.max_new_tokens)
        settings = OPENVINO_FULL_PRECISION if chosen == "openvino" and precision == "full" else {}
        with progress.task(f"answering: {path.name}, {chosen}", len(items)) as step:
            answers = _answers(path, chosen, settings, active, model, tokenizer, task, items, step)
            outcome = _judged(task, items, answers)
    return Evaluation(str(path), chosen, precision, settings, active, task.name, split, task.left_out, outcome)


def compare(runs: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """`agreement` of the first run with each other one, by each metric.

    Args:
        runs: of the same items; the first is what the others are held against.

    Returns:
        One entry per other run: `path`, `engine`, `precision`, `adapter` of the two under `first` and `second`, and
        under `metrics` metric -> agreement.

    Raises:
        BadInput: the runs are not of the same items.
    """
    compared = []
    for other in runs[1:]:
        sides = {
            side: {"path": run.path, "engine": run.engine, "precision": run.precision, "adapter": run.adapter}
            for side, run in (("first", runs[0]), ("second", other))
        }
        metrics = {name: agreement(runs[0].outcome, other.outcome, name) for name in other.outcome.right}
        compared.append({**sides, "metrics": metrics})
    return compared


def engine_of(path: Path, engine: EngineName | None = None) -> EngineName:
    """The engine that runs what is at a path.

    Raises:
        BadInput: nothing is there.
        UsageError: it is not for this engine, or it holds the folders of several targets.
    """
    if not path.is_dir():
        found = "a file; `sparseport export` makes a folder of a .gguf" if path.exists() else "nothing"
        raise BadInput("nothing to evaluate", where=path, expected="a folder", found=found, code="E_MISSING")
    targets = [name for name, file in _MODELS.items() if (path / file).is_file()]
    if not targets and any((path / name / file).is_file() for name, file in _MODELS.items()):
        raise UsageError("this folder holds the exports of several targets", where=path, fix=f"give {path}/openvino")
    if engine is None:
        return targets[0] if targets else "torch"
    if engine != "torch" and engine not in targets:
        raise UsageError(
            f"there is nothing for the engine {engine}",
            where=path,
            expected=_MODELS[engine],
            found=", ".join(_MODELS[name] for name in targets) or "a checkpoint",
            fix=f"export it with --target {engine}",
        )
    return engine


def adapter_for(path: Path, task: Task, engine: EngineName, adapter: str | None = None) -> str | None:
    """The file of the adapter that is active in a run; see `sparseport.nls.adapters.active_adapter`.

    Raises:
        UsageError: the folder has no such adapter, or several and none was chosen.
        Unsupported: the engine cannot switch it on for this task.
    """
    active = active_adapter(path, adapter)
    if active is not None and engine == "openvino" and task.by_choice:
        raise no_switch(path, active)
    return active


def load_torch(path: Path, adapter: str | None = None) -> nn.Module:
    """The float32 model of a checkpoint folder in any format that exports, or of what an exported folder holds.

    Args:
        path: the folder.
        adapter: file of an adapter beside an exported base; its branches are put beside the layers.

    Raises:
        BadInput, Unsupported: the checkpoint cannot be read, or not exactly.
        VerificationError: the exported graph cannot be read back.
    """
    for name, file in _MODELS.items():
        if (path / file).is_file():
            graph = open_reader(name, path)
            model: nn.Module = reference_of(path, graph)
            blocks = kept_blocks(read_settings(path / "config.json"))
            for beside in [] if adapter is None else graph.adapter(adapter):
                attach(model, in_whole_model(beside.module, blocks), beside.branch)
            return model
    return load_merged(make_recipe({"base": path, "output": path / "never-written"}, where=str(path)))


def _answers(
    path: Path,
    engine: EngineName,
    settings: Mapping[str, str],
    adapter: str | None,
    model: nn.Module | None,
    tokenizer: Any,
    task: Task,
    items: Sequence[Example],
    step: Step,
) -> list[str]:
    length, stop = task.max_new_tokens, task.stop
    if engine == "openvino":
        return answers_openvino(path, items, step, max_new_tokens=length, stop=stop, settings=settings, adapter=adapter)
    if engine == "onnx":
        return answers_onnx(path, items, step, max_new_tokens=length, stop=stop, adapter=adapter)
    assert model is not None
    return answers_torch(model, tokenizer, items, step, max_new_tokens=length, stop=stop)


def _judged(task: Task, items: Sequence[Example], answers: Sequence[str]) -> Outcome:
    right = judge(task.rule, answers, [item.answer for item in items])
    return Outcome(dict.fromkeys(right, tuple(answers)), right, digest_of(items))


def _require_room(path: Path, tokenizer: Any, items: Sequence[Example], new_tokens: int) -> None:
    """A prompt that is to be answered is not cut, so it has to leave room for an answer of full length."""
    longest = folder_length(path)
    for item in items:
        length = len(encode_prompt(tokenizer, item))
        if length + new_tokens > longest:
            raise BadInput(
                "a prompt leaves no room for its answer",
                where=f"{path}: {item.prompt[:80]!r}",
                expected=f"at most {longest - new_tokens} tokens",
                found=length,
            )
