"""`sparseport search` and `run` as commands: a search goes on, and what does not belong to it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseport.cli import main

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture
def trained(tiny_base: Path, tmp_path: Path) -> dict[str, Any]:
    """A LoNAS super-adapter of two blocks, its recipe, and the command line that searches it."""
    task = tmp_path / "task.jsonl"
    splits = ["train"] * 8 + ["validation"] * 4 + ["test"] * 4
    lines = [{"prompt": f"{n} and", "answer": f" {n + 1}", "split": s, "form": "text"} for n, s in enumerate(splits)]
    task.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    job = {
        "finetune": {
            "method": "lonas",
            "task": str(task),
            "search_space": [8, 4],
            "widths": [128, 96, 64],
            "steps": 2,
            "batch_size": 4,
        },
        "search": {"strategy": "hill_climbing", "objectives": ["accuracy", "macs"], "turns": 1, "neighbours": 2},
        "export": {"target": ["openvino"]},
    }
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(job), encoding="utf-8")
    adapter = tmp_path / "adapter"
    made = ["--config", str(config), "--base", str(tiny_base), "--output", str(adapter), "--quiet"]
    assert main(["finetune", *made]) == 0
    inputs = ["--config", str(config), "--base", str(tiny_base), "--adapter", str(adapter), "--quiet"]
    return {"job": job, "config": config, "adapter": adapter, "search": ["search", *inputs], "task": task}


def test_a_search_goes_on_where_it_was(trained: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "found"
    command = [*trained["search"], "--output", str(out), "--json"]
    capsys.readouterr()
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    journal = (out / "journal.jsonl").read_bytes()
    assert first["evaluations"] == len(journal.splitlines()) - 1 == 5
    # Cut off in the middle of a line, as a crash leaves it: that evaluation is made again, the others are not.
    (out / "journal.jsonl").write_bytes(journal[:-20])
    assert main(command) == 0
    again = json.loads(capsys.readouterr().out)
    assert {key: again[key] for key in ("evaluations", "chosen", "front")} == {
        key: first[key] for key in ("evaluations", "chosen", "front")
    }
    kept = (out / "journal.jsonl").read_bytes().splitlines()
    assert kept[:-1] == journal.splitlines()[:-1]
    sizes = json.loads((out / "sub_adapter.json").read_text(encoding="utf-8"))
    space = json.loads((trained["adapter"] / "search_space.json").read_text(encoding="utf-8"))
    assert all(size in group["sizes"] for size, group in zip(sizes, space["groups"], strict=True))
    assert {"search.json", "front.svg", "front.png"} <= {path.name for path in out.iterdir()}
    assert str(tmp_path) not in (out / "search.json").read_text(encoding="utf-8")


def test_a_journal_of_another_run_is_refused(trained: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "found"
    command = [*trained["search"], "--output", str(out)]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for change in ("search.seed=1", "search.items=2", "search.objectives=[accuracy]"):
        capsys.readouterr()
        assert main([*command, "--set", change]) == 2
        assert "journal" in capsys.readouterr().err
    trained["task"].write_text(trained["task"].read_text(encoding="utf-8").replace("9 and", "9 or"), encoding="utf-8")
    assert main([*command]) == 2, "other validation items are another search"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_was_not_trained_together_is_refused(trained: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    """A recipe with other ranks, and a space of another model: nothing is measured."""
    out = tmp_path / "found"
    assert main([*trained["search"], "--output", str(out), "--set", "finetune.search_space=[16, 8]"]) == 3
    assert "recipe that the adapter was trained with" in capsys.readouterr().err
    space = trained["adapter"] / "search_space.json"
    content = json.loads(space.read_text(encoding="utf-8"))
    content["groups"][0]["targets"] = ["model.layers.9.self_attn.q_proj"]
    space.write_text(json.dumps(content), encoding="utf-8")
    assert main([*trained["search"], "--output", str(tmp_path / "other")]) == 3
    assert not (tmp_path / "other" / "search.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "search.split=test"], "validation"),
        (["--set", "search.objectives=[latency]"], "objectives are accuracy"),
        (["--set", "search.strategy=nsga2"], "turns belongs to the strategy hill_climbing"),
        (["--set", "search.workers=2"], "backend processes or ray"),
        (["--sparse-base", "BASE"], "only qa_sparse_peft"),
        (["--adapter", "nowhere"], "--adapter is no folder"),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    words: list[str], message: str, trained: dict[str, Any], tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    words = [str(tiny_base) if word == "BASE" else word for word in words]
    assert main([*trained["search"], "--output", str(tmp_path / "found"), *words]) in (2, 3)
    assert message in capsys.readouterr().err and not (tmp_path / "found").exists()


def test_run_is_a_command(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    job = tmp_path / "job.yaml"
    sparsify = {"metric": "magnitude", "pattern": "2:4"}
    export = {"target": ["openvino"], "tokenizer": False, "numerics": False}
    job.write_text(yaml.safe_dump({"sparsify": sparsify, "export": export}), encoding="utf-8")
    command = ["run", str(job), "--base", str(tiny_base), "--work-dir", str(tmp_path / "work"), "--quiet"]
    pytest.importorskip("openvino")
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exports"]["exported"]["ok"] and set(found["steps_seconds"]) == {"sparse", "exported"}
    assert main([*command, "--set", "quantise={}"]) == 3
    assert "quantise" in capsys.readouterr().err
