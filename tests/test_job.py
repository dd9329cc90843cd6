"""A job's frame: what makes a step be done again, what contradicts itself, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseport.errors import EnvironmentProblem, SparseportError, UsageError
from sparseport.job import inputs, run
from sparseport.job.run import run_job
from sparseport.job.steps import Steps, task_facts
from sparseport.progress import Progress
from sparseport.verbs.making import MARKER

METHODS = Path(__file__).parents[1] / "export_configs" / "methods"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that write one small file instead of working; the list says which ran."""
    ran: list[str] = []

    def step(name: str, out: Path) -> None:
        ran.append(name)
        out.mkdir(exist_ok=True, parents=True)
        (out / "made.txt").write_text(str(len(ran)))
        if name == "exported":
            (out / "sparseport.json").write_text("{}")

    monkeypatch.setattr(run, "hide_library_bars", lambda: None)
    for place in (run, inputs):
        monkeypatch.setattr(place, "require_space", lambda job, base: None)
    monkeypatch.setattr(inputs, "make_base", lambda source, out, *rest: step("base", out))
    monkeypatch.setattr(inputs, "_sparse", lambda job, made, out, progress: step("sparse", out))
    monkeypatch.setattr(inputs, "_int4", lambda job, made, out, progress: step("int4", out))
    monkeypatch.setattr(inputs, "_adapter", lambda finetune, made, out, progress: step("adapter", out))
    monkeypatch.setattr(run, "_export", lambda recipe, out, progress: step("exported", out))
    monkeypatch.setattr(run, "_measure", lambda *rest: ran.append("measure") or {})
    monkeypatch.setattr(run, "_verified", lambda folder, progress: {})
    return ran


def job_file(tmp_path: Path, **sections: Any) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"export": {"target": ["openvino"]}, **sections}), encoding="utf-8")
    return path


def again(made: list[str], *arguments: Any, **options: Any) -> list[str]:
    """The steps that a run repeats."""
    made.clear()
    run_job(*arguments, **options)
    return list(made)


def test_every_step_depends_on_the_base_that_was_given(
    made: list[str], tiny_base: Path, tiny_sparse: Path, tmp_path: Path
) -> None:
    sections = {"quantize": {"method": "rtn"}, "finetune": {"method": "sqft"}, "sparsify": {"metric": "magnitude"}}
    job = job_file(tmp_path, **sections, export={"target": ["openvino"], "branches": "graph"})
    everything = ["sparse", "int4", "adapter", "exported", "measure"]
    assert again(made, job, tmp_path / "work", base=tiny_base) == everything
    assert again(made, job, tmp_path / "work", base=tiny_base) == []
    assert again(made, job, tmp_path / "work", base=tiny_sparse) == everything
    bare = job_file(tmp_path)
    assert again(made, bare, tmp_path / "bare", base=tiny_base) == ["exported"]
    assert again(made, bare, tmp_path / "bare", base=tiny_base) == []
    assert again(made, bare, tmp_path / "bare", base=tiny_sparse) == ["exported"]


def test_files_in_settings_are_known_by_their_content(made: list[str], tiny_base: Path, tmp_path: Path) -> None:
    sizes = tmp_path / "sizes.json"
    sizes.write_text("[32]")
    export = {"target": ["openvino"], "sub_adapter": str(sizes)}
    job = job_file(tmp_path, finetune={"method": "lora", "search_space": [32, 16]}, export=export)
    assert again(made, job, tmp_path / "work", base=tiny_base) == ["adapter", "exported", "measure"]
    assert again(made, job, tmp_path / "work", base=tiny_base) == []
    sizes.write_text("[16]")
    assert again(made, job, tmp_path / "work", base=tiny_base) == ["exported", "measure"]


def test_a_metric_of_the_users_is_known_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "my_metric_of_a_test.py"
    module.write_text("def score(weight, norms, name): return weight.abs()\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def steps() -> list[str]:
        ran: list[str] = []
        one = Steps(tmp_path / "work", {"sparse": MARKER}, Progress("quiet"))
        one.folder("sparse", [{"metric": "my_metric_of_a_test:score"}], lambda out: ran.append("sparse"))
        return ran

    assert steps() == ["sparse"] and steps() == []
    module.write_text("def score(weight, norms, name): return weight.square()\n")
    assert steps() == ["sparse"]


def test_a_task_file_is_known_by_name_and_content(tmp_path: Path) -> None:
    task = tmp_path / "mine.jsonl"
    task.write_text("a")
    first = task_facts(str(task))
    assert first["task"] == "mine.jsonl" and str(tmp_path) not in json.dumps(first)
    task.write_text("b")
    assert task_facts(str(task)) != first
    (tmp_path / "mc").mkdir()
    (tmp_path / "mc" / "x.jsonl").write_text("a")
    data = task_facts("arc-easy", tmp_path)
    (tmp_path / "mc" / "x.jsonl").write_text("b")
    assert task_facts("arc-easy", tmp_path) != data


def test_choices_cannot_be_scored_with_an_adapter_in_a_file(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "mc").mkdir()
    for split in ("train", "test"):
        lines = [{"id": n, "question": f"{split} question {n}?", "choices": ["a", "b"], "gold": 0} for n in range(8)]
        (tmp_path / "mc" / f"arc_easy.{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    finetune = {"method": "shears", "task": "arc-easy", "data": str(tmp_path)}
    export = {"target": ["openvino"], "branches": "adapter"}
    with pytest.raises(UsageError, match="score the choices"):
        run_job(job_file(tmp_path, finetune=finetune, sparsify={}, export=export), tmp_path / "work", base=tiny_base)


LORA = {"method": "lora"}
FIXED = {"method": "lora", "nls": False, "search_space": [8]}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"finetune": {"method": "shears"}, "sparsify": {}}, "set export.branches to graph"),
        ({"finetune": {"method": "sqft"}, "sparsify": {}, "quantize": {}}, "set export.branches to graph"),
        (
            {
                "finetune": {"method": "sparse_peft"},
                "sparsify": {},
                "export": {"target": ["openvino"], "branches": "graph"},
            },
            "leave export.branches away",
        ),
        ({"finetune": FIXED, "search": {}}, "set finetune.nls to true"),
        ({"finetune": FIXED, "export": {"target": ["openvino"], "sub_adapter": "heuristic"}}, "finetune.nls"),
        ({"finetune": LORA, "sparsify": {}}, "nothing would use the sparse one"),
        ({"finetune": LORA, "quantize": {}}, "nothing would use the INT4 one"),
        ({"search": {}}, "section 'finetune'"),
    ],
)
def test_contradictions_are_refused_before_any_work(
    sections: dict[str, Any], message: str, made: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        run_job(job_file(tmp_path, **sections), tmp_path / "work", base=tiny_base)
    assert message in str(caught.value) and made == [] and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("search", "package"),
    [
        ({"objectives": ["accuracy", "macs"]}, "matplotlib"),
        ({"strategy": "nsga2"}, "pymoo"),
        ({"backend": "ray"}, "ray"),
    ],
)
def test_a_missing_package_is_found_before_any_work(
    search: dict[str, Any], package: str, made: list[str], tiny_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from sparseport import extras

    found = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(EnvironmentProblem, match="not installed") as caught:
        run_job(job_file(tmp_path, finetune=LORA, search=search), tmp_path / "work", base=tiny_base)
    assert package in str(caught.value) and made == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"finetune": {**LORA, "task": "nope"}}, "no such task"),
        ({"finetune": {**LORA, "task": "arc-easy"}}, "needs its data set"),
        ({"finetune": LORA, "search": {"metric": "acc_norm"}}, "no such metric"),
    ],
)
def test_a_task_that_is_not_there_is_found_before_any_work(
    sections: dict[str, Any], message: str, made: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(SparseportError, match=message):
        run_job(job_file(tmp_path, **sections), tmp_path / "work", base=tiny_base)
    assert made == [] and not (tmp_path / "work").exists()


def test_a_space_that_the_model_cannot_have_is_refused_before_any_work(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    job = job_file(tmp_path, finetune={"method": "lonas", "heads": [9, 2], "widths": []})
    with pytest.raises(Exception, match="heads") as caught:
        run_job(job, tmp_path / "work", base=tiny_base)
    assert getattr(caught.value, "exit_code", None) in (3, 7) and not (tmp_path / "work").exists()
