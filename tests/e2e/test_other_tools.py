"""Exported folders in other tools as they are: optimum's pipeline(), and lm-evaluation-harness' own backends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparseport import cli
from sparseport.errors import OutputExists, Unsupported, UsageError
from sparseport.integrations.lm_eval import write_task
from sparseport.nls.evaluation import evaluate
from sparseport.nls.tasks import Task, load_task
from sparseport.verify.runs import OPENVINO_FULL_PRECISION

pytest.importorskip("optimum.intel")
pytest.importorskip("openvino_genai")
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

ROWS = [
    {"question": "What is wet?", "choices": ["water", "sand", "a stone in the sun"], "gold": 0},
    {"question": "Which of these is the longest word of all the words here?", "choices": ["a", "bb", "ccc"], "gold": 2},
    {"question": 'Is "né" {{a}} word?\u2028', "choices": ["yes, it is", "né"], "gold": 1},
    *({"question": f"Is {n} more than {n - 1}?", "choices": ["yes", "no"], "gold": 0} for n in range(1, 6)),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "mc").mkdir()
    for part in ("train", "test"):
        lines = [json.dumps({**row, "question": f"{part}: {row['question']}"}) for row in ROWS]
        (folder / "mc" / f"arc_easy.{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def task(data: Path) -> Task:
    return load_task("arc-easy", data)


@pytest.fixture(scope="module")
def folders(tiny_both: Any) -> dict[str, Path]:
    return {name: tiny_both[0].output / name for name in ("openvino", "onnx")}


def test_optimum_pipeline_says_what_genai_says(folders: dict[str, Path]) -> None:
    """`pipeline("text-generation", accelerator="openvino")` takes the folder by its path, with nothing of ours."""
    import openvino_genai
    from optimum.intel import pipeline

    folder = str(folders["openvino"])
    made = pipeline("text-generation", folder, accelerator="openvino")
    made.model.ov_config.update(OPENVINO_FULL_PRECISION)
    made.model.compile()
    genai = openvino_genai.LLMPipeline(folder, "CPU", **OPENVINO_FULL_PRECISION)
    config = openvino_genai.GenerationConfig(max_new_tokens=24, do_sample=False, apply_chat_template=False)
    for prompt in ("Say hello", "one, two, three"):
        (answer,) = made(prompt, max_new_tokens=24, do_sample=False, return_full_text=False)
        assert answer["generated_text"] == str(genai.generate(prompt, config)) != ""


@pytest.mark.parametrize(("backend", "target"), [("openvino", "openvino"), ("onnxruntime-genai", "onnx")])
def test_lm_eval_computes_what_evaluate_computes(
    backend: str, target: str, folders: dict[str, Path], task: Task, tmp_path: Path
) -> None:
    """The harness' own code reads the items, asks the runtime its own way and judges; each number is the same."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    name = write_task(task, tmp_path / "first")
    moved = shutil.move(tmp_path / "first", tmp_path / "task")  # nothing in it says where it lies
    model_args: dict[str, Any] = {"pretrained": str(folders[target])}
    if backend == "openvino":
        (tmp_path / "full.json").write_text(json.dumps(OPENVINO_FULL_PRECISION), encoding="utf-8")
        model_args["ov_config"] = str(tmp_path / "full.json")
    found = simple_evaluate(
        model=backend,
        model_args=model_args,
        tasks=[name],
        task_manager=TaskManager(include_path=str(moved), include_defaults=False),
        bootstrap_iters=0,
    )
    ours = evaluate(folders[target], task, precision="full")
    for metric in ("acc", "acc_norm"):
        assert found["results"][name][f"{metric},none"] == ours.outcome.metrics()[metric]["value"]
    theirs = sorted(found["samples"][name], key=lambda sample: int(sample["doc_id"]))
    assert len(theirs) == len(ROWS)
    for sample, own in zip(theirs, ours.outcome.loglikelihoods, strict=True):
        assert [float(value) for (value, _), *_ in sample["resps"]] == pytest.approx(own, abs=1e-3)


def test_evaluate_writes_the_items_that_it_asks(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(folders["openvino"]), "--task", "arc-easy", "--data", str(data), "--limit", "3"]
    command += ["--lm-eval-task", str(tmp_path / "task"), "--quiet", "--json"]
    assert cli.main(command) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    text = (tmp_path / "task" / "sparseport_arc_easy.yaml").read_text("utf-8")
    assert f"items_sha256: {run['items_sha256']}" in text and str(tmp_path) not in text
    lines = (tmp_path / "task" / "items.jsonl").read_text("utf-8").rstrip("\n").split("\n")
    assert [json.loads(line)["choices"] for line in lines] == [row["choices"] for row in ROWS[:3]]
    assert cli.main(command) == 6  # the folder is there, so nothing is measured


def test_what_is_no_task_of_the_harness_is_refused(task: Task, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="written answers"):
        write_task(load_task("home-commands"), tmp_path / "task")
    with pytest.raises(UsageError, match="limit"):
        write_task(task, tmp_path / "task", limit=0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "task").mkdir()
    with pytest.raises(OutputExists):
        write_task(task, tmp_path / "task")
