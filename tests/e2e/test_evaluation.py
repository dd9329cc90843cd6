"""Exported folders answer as torch does with the same weights, and the verb says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparseport.cli import main
from sparseport.errors import BadInput, UsageError
from sparseport.nls.evaluation import compare, engine_of, evaluate
from sparseport.nls.tasks import Task, load_task

ROWS = [
    {"question": "What is wet?", "choices": ["water", "sand", "a stone in the sun"], "gold": 0},
    {"question": "Which of these is the longest word of all the words here?", "choices": ["a", "bb", "ccc"], "gold": 2},
    {"question": "Is né a word?", "choices": ["yes, it is", "né"], "gold": 1},
    *({"question": f"Is {n} more than {n - 1}?", "choices": ["yes", "no"], "gold": 0} for n in range(1, 8)),
]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"


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
def folders(tiny_both: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both exports, with a chat template beside the tokenizer."""
    copy = tmp_path_factory.mktemp("folders") / "out"
    shutil.copytree(tiny_both[0].output, copy)
    found = {name: copy / name for name in ("openvino", "onnx")}
    for folder in found.values():
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**settings, "chat_template": TEMPLATE}), encoding="utf-8")
    return found


@pytest.mark.parametrize("target", ["openvino", "onnx"])
def test_choices_are_those_of_torch(target: str, folders: dict[str, Path], task: Task) -> None:
    """Contexts are shared, rows are of different lengths, and one session answers all items twice in a row."""
    exported = evaluate(folders[target], task, precision="full")
    reference = evaluate(folders[target], task, engine="torch")
    assert exported.engine == target and exported.settings and not reference.settings
    for ours, theirs in zip(exported.outcome.loglikelihoods, reference.outcome.loglikelihoods, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    (compared,) = compare([reference, exported])
    for found in compared["metrics"].values():
        assert (found["same"], found["lost"], found["gained"], found["p_value"]) == (1.0, 0, 0, 1.0)
        assert 0 < found["max_loglikelihood_difference"] < 1e-3
    assert evaluate(folders[target], task).outcome.predictions == exported.outcome.predictions


def test_both_folders_and_the_merged_checkpoint_are_one_model(
    folders: dict[str, Path], tiny_qa_inputs: Any, task: Task
) -> None:
    from transformers import AutoTokenizer

    from sparseport.nls.engines import TorchEngine
    from sparseport.nls.reference import load_merged
    from sparseport.nls.scoring import score_choices
    from sparseport.recipe import make_recipe

    model = load_merged(make_recipe({**tiny_qa_inputs, "output": "never"}))
    tokenizer = AutoTokenizer.from_pretrained(tiny_qa_inputs["base"])
    merged = score_choices(TorchEngine(model), tokenizer, task.choices["test"])
    for target, folder in folders.items():
        run = evaluate(folder, task, precision="full")
        for ours, theirs in zip(run.outcome.loglikelihoods, merged.loglikelihoods, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3), target


def _task_file(path: Path, form: str) -> Path:
    lines = [
        {"prompt": f"Say {word}" if split == "test" else split, "answer": word, "split": split, "form": form}
        for split in ("train", "validation", "test")
        for word in ("hello", "good bye")
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    return _task_file(tmp_path / "mine.jsonl", "text")


@pytest.mark.parametrize("form", ["chat", "text"])
def test_written_answers_are_those_of_torch(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    path = _task_file(tmp_path / "mine.jsonl", form)
    task = load_task(str(path))
    reference = evaluate(folders["openvino"], task, engine="torch")
    answers = reference.outcome.predictions["exact_match"]
    assert len(set(answers)) == 2 and all(len(str(answer)) > 4 for answer in answers)
    for folder in folders.values():
        assert evaluate(folder, task).outcome == reference.outcome
    # Shorter answers, which end where they are told to, are the beginnings of the long ones.
    from dataclasses import replace

    stop = str(answers[0])[3]
    short = replace(task, max_new_tokens=12, stop=(stop,))
    runs = [evaluate(folders["openvino"], short, engine="torch"), *(evaluate(path, short) for path in folders.values())]
    assert len({run.outcome.predictions["exact_match"] for run in runs}) == 1
    ended = str(runs[0].outcome.predictions["exact_match"][0])
    assert str(answers[0]).startswith(ended) and stop not in ended


def test_greedy_answers_follow_no_generation_settings_of_the_folder(
    folders: dict[str, Path], task_file: Path, tmp_path: Path
) -> None:
    """What published models' folders ask for, made strong enough to change every answer."""
    task = load_task(str(task_file))
    settings = {"do_sample": True, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3}
    settings |= {"temperature": 2.0, "num_return_sequences": 2, "min_length": 100, "suppress_tokens": [*range(60, 200)]}
    for name, folder in folders.items():
        wanted = evaluate(folder, task).outcome
        copy = Path(shutil.copytree(folder, tmp_path / name))
        file = copy / "generation_config.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        file.write_text(json.dumps({**before, **settings}), encoding="utf-8")
        if (file := copy / "genai_config.json").is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            config["search"] |= {key: value for key, value in settings.items() if key != "suppress_tokens"}
            file.write_text(json.dumps(config), encoding="utf-8")
        assert evaluate(copy, task).outcome == wanted
        assert evaluate(copy, task, engine="torch").outcome == wanted


def test_an_int4_checkpoint_runs_in_torch(tiny_int4: Path, task: Task) -> None:
    from transformers import AutoTokenizer

    from sparseport.nls.engines import TorchEngine
    from sparseport.nls.load import load_int4
    from sparseport.nls.scoring import score_choices

    run = evaluate(tiny_int4, task, split="validation")
    wanted = score_choices(
        TorchEngine(load_int4(tiny_int4)), AutoTokenizer.from_pretrained(tiny_int4), task.choices["validation"]
    )
    assert run.engine == "torch" and run.outcome == wanted


def test_plain_data(folders: dict[str, Path], task: Task) -> None:
    run = evaluate(folders["onnx"], task, limit=3).as_dict()
    assert json.loads(json.dumps(run)) == run
    assert run["items"] == len(run["records"]) == 3
    record = run["records"][0]
    assert record["acc"]["right"] == (record["acc"]["answer"] == ROWS[0]["gold"])
    assert record["acc"]["answer"] == record["loglikelihoods"].index(max(record["loglikelihoods"]))
    assert run["metrics"]["acc"]["value"] == sum(one["acc"]["right"] for one in run["records"]) / 3


def test_the_verb_compares_with_the_first(folders: dict[str, Path], data: Path, capsys: Any) -> None:
    common = ["--task", "arc-easy", "--data", str(data), "--quiet"]
    paths = [str(folders["openvino"]), str(folders["onnx"]), str(folders["onnx"])]
    engines = ["--engine", "torch", "--engine", "onnx", "--engine", "onnx"]
    assert main(["evaluate", *paths, *common, *engines, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [run["engine"] for run in result["runs"]] == ["torch", "onnx", "onnx"]
    assert len(result["agreement"]) == 2
    assert result["agreement"][0]["metrics"]["acc"]["same"] == 1.0
    assert main(["evaluate", *paths[:2], *common, "--limit", "2", "--split", "validation"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 items of validation" in shown and "100.0% equal answers, 0 lost, 0 gained" in shown


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nothing-there"], 3, "nothing to evaluate"),
        (["{out}"], 2, "several targets"),
        (["{out}/onnx", "--engine", "openvino"], 2, "openvino_model.xml"),
        (["{out}/onnx", "--engine", "onnx", "--engine", "onnx"], 2, "once for each"),
        (["{out}/onnx", "--limit", "0"], 2, "limit"),
    ],
)
def test_what_cannot_be_run_is_refused(
    arguments: list[str], status: int, message: str, folders: dict[str, Path], data: Path, capsys: Any
) -> None:
    out = str(folders["onnx"].parent)
    given = [argument.replace("{out}", out) for argument in arguments]
    assert main(["evaluate", *given, "--task", "arc-easy", "--data", str(data), "--quiet"]) == status
    assert message in capsys.readouterr().err


def test_engines_of_folders(folders: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    assert [engine_of(folder) for folder in (*folders.values(), tiny_base)] == ["openvino", "onnx", "torch"]
    assert engine_of(folders["onnx"], "torch") == "torch"
    with pytest.raises(UsageError, match="a checkpoint"):
        engine_of(tiny_base, "onnx")
    with pytest.raises(BadInput, match=r"\.gguf"):
        file = tmp_path / "m.gguf"
        file.write_bytes(b"")
        engine_of(file)


def test_onnx_answers_have_one_precision_and_room_is_needed(folders: dict[str, Path], tmp_path: Path) -> None:
    from dataclasses import replace

    task = load_task("home-commands")
    with pytest.raises(UsageError, match="as it was written"):
        evaluate(folders["onnx"], task, precision="full")
    with pytest.raises(BadInput, match="no room"):
        evaluate(folders["onnx"], replace(task, max_new_tokens=250))
