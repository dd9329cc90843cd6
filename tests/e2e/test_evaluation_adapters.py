"""A folder with an adapter beside its base is measured with the adapter, or without it if that is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branch_models import dense_adapter
from e2e.in_process import in_process
from sparseport.cli import main
from sparseport.errors import Unsupported, UsageError
from sparseport.further import add_adapter
from sparseport.nls.evaluation import compare, evaluate
from sparseport.nls.latency import measure_latency
from sparseport.nls.tasks import Task, load_task
from sparseport.pipeline import export
from sparseport.recipe import make_recipe
from sparseport.verify.sessions import OnnxSession

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("openvino_genai")
peft = pytest.importorskip("peft")

FILES = {"openvino": "adapter.safetensors", "onnx": "adapter.onnx_adapter"}


@pytest.fixture(scope="module")
def adapter(tiny_sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is loud enough to change answers."""
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    dense_adapter(tiny_sparse, out, alpha=24.0)
    return out


@pytest.fixture(scope="module")
def folders(tiny_sparse: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    fields = {"base": tiny_sparse, "adapter": adapter, "branches": "adapter", "numerics": False, "embedding": "fp32"}
    out = tmp_path_factory.mktemp("folders") / "out"
    result = export(make_recipe({**fields, "output": out, "target": ["openvino", "onnx"]}))
    return {one.folder.name: one.folder for one in result.exports}


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    with in_process():
        yield


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "mine.jsonl"
    words = ["hello", "good bye", "what", "seven", "left"]
    lines = [{"prompt": f"Say {word}", "answer": word, "split": "test", "form": "text"} for word in words]
    lines += [{"prompt": split, "answer": "x", "split": split} for split in ("train", "validation")]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def task(task_file: Path) -> Task:
    return load_task(str(task_file))


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("data")
    (folder / "mc").mkdir()
    rows = [{"question": f"Is {n} more than {n + 2}?", "choices": ["yes", "no, no"], "gold": 1} for n in range(6)]
    for part in ("train", "test"):
        lines = [json.dumps({**row, "question": f"{part}: {row['question']}"}) for row in rows]
        (folder / "mc" / f"arc_easy.{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return load_task("arc-easy", folder)


def _peft_answers(base: Path, adapter: Path | None, task: Task) -> tuple[str, ...]:
    """Greedy answers of torch with peft's own adapter, token by token."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    answers = []
    for item in task.test:
        ids = tokenizer(item.prompt, return_tensors="pt").input_ids
        start = ids.shape[1]
        with torch.no_grad():
            while ids.shape[1] < start + task.max_new_tokens:
                chosen = model(ids).logits[0, -1].argmax()
                if int(chosen) == tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, chosen.reshape(1, 1)], dim=1)
        answers.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())
    return tuple(answers)


@pytest.mark.parametrize("target", FILES)
def test_written_answers_are_those_of_the_adapter(
    target: str, folders: dict[str, Path], task: Task, tiny_sparse: Path, adapter: Path
) -> None:
    tuned, plain = (_peft_answers(tiny_sparse, one, task) for one in (adapter, None))
    assert tuned != plain
    precision: Any = "full" if target == "openvino" else "default"
    for engine in (target, "torch"):
        runs = [
            evaluate(folders[target], task, engine=engine, precision=precision, adapter=wanted)  # type: ignore[arg-type]
            for wanted in (None, FILES[target], "none")
        ]
        assert [run.adapter for run in runs] == [FILES[target], FILES[target], None]
        assert [run.outcome.predictions["exact_match"] for run in runs] == [tuned, tuned, plain]
    assert runs[0].as_dict()["adapter"] == FILES[target]
    assert compare(runs)[1]["second"]["adapter"] is None


def test_log_likelihoods_are_those_of_the_adapter(folders: dict[str, Path], choices: Task, monkeypatch: Any) -> None:
    found = {}
    for target, engine in (("onnx", "onnx"), ("onnx", "torch"), ("openvino", "torch")):
        run = evaluate(folders[target], choices, engine=engine, precision="full")  # type: ignore[arg-type]
        assert run.adapter == FILES[target]
        found[target, engine] = np.array(run.outcome.loglikelihoods)
    for values in found.values():
        assert np.abs(values - found["onnx", "torch"]).max() < 1e-3
    plain = evaluate(folders["onnx"], choices, precision="full", adapter="none")
    assert plain.adapter is None
    assert np.abs(np.array(plain.outcome.loglikelihoods) - found["onnx", "torch"]).max() > 0.1


def test_what_openvino_cannot_switch_is_refused(folders: dict[str, Path], choices: Task) -> None:
    folder = folders["openvino"]
    with pytest.raises(Unsupported, match=r"adapter\.safetensors.*--branches graph"):
        evaluate(folder, choices)
    with pytest.raises(Unsupported, match="--branches graph"):
        measure_latency([folder], prompts=(4,), decode_tokens=1, rounds=1)
    assert evaluate(folder, choices, adapter="none").adapter is None
    result = measure_latency([folder], prompts=(4,), decode_tokens=1, rounds=1, warm_up=0, adapter="none")
    assert result["folders"][0]["adapter"] is None


def test_latency_is_that_of_the_adapter(folders: dict[str, Path], monkeypatch: Any) -> None:
    """What each session was opened with; how long it takes says nothing."""
    opened: list[Any] = []
    plain = OnnxSession.__init__

    def init(self: Any, session: Any, cache: Any, adapter: Any = None) -> None:
        opened.append(adapter)
        plain(self, session, cache, adapter)

    monkeypatch.setattr(OnnxSession, "__init__", init)
    common: dict[str, Any] = {"prompts": (4,), "decode_tokens": 1, "rounds": 1, "warm_up": 0}
    results = [measure_latency([folders["onnx"]], **common, adapter=wanted) for wanted in (None, "none")]
    assert [result["folders"][0]["adapter"] for result in results] == [FILES["onnx"], None]
    assert opened[0] is not None and opened[1] is None


def test_one_of_several_is_chosen_by_name(
    folders: dict[str, Path], task: Task, tiny_sparse: Path, tiny_base: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["onnx"], tmp_path / "out"))
    dense_adapter(tiny_sparse, tmp_path / "second", alpha=24.0, seed=9)
    add_adapter(folder, tmp_path / "second", "second", numerics=False)
    with pytest.raises(UsageError, match=r"adapter\.onnx_adapter, second\.onnx_adapter, or none"):
        evaluate(folder, task)
    with pytest.raises(UsageError, match="third"):
        evaluate(folder, task, adapter="third.onnx_adapter")
    with pytest.raises(UsageError, match="no such adapter"):
        evaluate(tiny_base, task, adapter="adapter.onnx_adapter")
    names = [FILES["onnx"], "second.onnx_adapter"]
    runs = [evaluate(folder, task, adapter=name) for name in names]
    reference = [evaluate(folder, task, adapter=name, engine="torch") for name in names]
    assert [run.outcome for run in runs] == [run.outcome for run in reference]
    assert runs[0].outcome != runs[1].outcome


def test_the_verb_says_which_adapter_was_active(folders: dict[str, Path], task_file: Path, capsys: Any) -> None:
    paths = [str(folders["onnx"])] * 2
    command = ["evaluate", *paths, "--task", str(task_file), "--limit", "1", "--quiet"]
    assert main([*command, "--adapter", FILES["onnx"], "--adapter", "none", "--json"]) == 0
    assert [run["adapter"] for run in json.loads(capsys.readouterr().out)["runs"]] == [FILES["onnx"], None]
    assert main(command) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert f"with{FILES['onnx']}(onnx)againstthefirst" in shown
    assert main([*command, *["--adapter", "none"] * 3]) == 2
    assert "--adapter is given once for all paths" in capsys.readouterr().err
    assert main([*command, "--adapter", "other.onnx_adapter"]) == 2
    assert FILES["onnx"] in capsys.readouterr().err
