"""Every system of the method family, in small: each recipe trains, exports to both targets and is verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from e2e.in_process import in_process
from sparseport.errors import UsageError
from sparseport.job.run import run_job
from sparseport.layout import FOLDERS, TARGETS
from sparseport.verify.certificate import Certificate

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime_genai")

METHODS = Path(__file__).parents[2] / "export_configs" / "methods"
SMALL = (
    "finetune.steps=3",
    "finetune.batch_size=4",
    "finetune.warmup_steps=1",
    "finetune.test_items=4",
    "finetune.width_multiple=16",
    "export.tokenizer=true",
)
NAMES = sorted(path.stem for path in METHODS.glob("*.yaml"))


@pytest.fixture
def task(tmp_path: Path) -> str:
    """A task without a chat template, which the tiny model has none of."""
    file = tmp_path / "task.jsonl"
    splits = ["train"] * 12 + ["validation"] * 4 + ["test"] * 4
    lines = [
        {"prompt": f"{n} plus {n} is", "answer": f" {2 * n}", "split": split, "form": "text"}
        for n, split in enumerate(splits)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def settings(name: str, task: str) -> tuple[str, ...]:
    """The overrides that make a recipe small enough for the tiny model: 2 blocks, 2 key-value heads, 128 channels."""
    recipe = yaml.safe_load((METHODS / f"{name}.yaml").read_text(encoding="utf-8"))
    chosen = [*SMALL, f"finetune.task={task}"] if "finetune" in recipe else [SMALL[-1]]
    if "sparsify" in recipe:
        chosen += ["sparsify.samples=2", "sparsify.sequence_length=64"]
    if recipe.get("finetune", {}).get("heads"):
        chosen.append("finetune.heads=[2,1]")
    if recipe.get("finetune", {}).get("elastic_blocks"):
        chosen.append("finetune.elastic_blocks=[1]")
    if "quantize" in recipe:
        chosen.append("quantize.group_size=32")
    if "search" in recipe:
        chosen.append("search.items=4")
        small = {
            "hill_climbing": ["turns=1", "neighbours=2", "evaluations=6"],
            "nsga2": ["population=4", "evaluations=5"],
        }
        chosen += [f"search.{setting}" for setting in small.get(recipe["search"]["strategy"], ["lowest_loss=1"])]
    return tuple(chosen)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_exports_and_verifies(name: str, tiny_base: Path, tmp_path: Path, task: str) -> None:
    recipe = yaml.safe_load((METHODS / f"{name}.yaml").read_text(encoding="utf-8"))
    with in_process():
        found = run_job(METHODS / f"{name}.yaml", tmp_path / "work", settings(name, task), base=tiny_base)
    assert {verdict["ok"] for verdict in found["exports"].values()} == {True}
    assert sorted(found["exports"]) == sorted(TARGETS if "draft" not in recipe["export"] else FOLDERS)
    certificate = Certificate.read(tmp_path / "work" / "exported" / "openvino")
    rules = {facts["rule"] for facts in certificate.linears.values()}
    method = recipe.get("finetune", {}).get("method")
    own = {"lora": "lora", "lonas": "lora", "shears": "branch", "sqft": "branch", None: "carry"}.get(method, method)
    assert own in rules
    assert certificate.body["numerics"]["run"]
    sparse = float(certificate.totals["sparsity"])
    assert sparse == (pytest.approx(0.5, abs=0.01) if "sparsify" in recipe else 0.0)
    assert certificate.totals["int4_linears"] == (14 if "quantize" in recipe else 0)
    if "search" in recipe:
        search = json.loads((tmp_path / "work" / "search" / "search.json").read_text(encoding="utf-8"))
        chosen = json.loads((tmp_path / "work" / "search" / "sub_adapter.json").read_text(encoding="utf-8"))
        assert search["chosen"] == chosen and found["search"]["evaluations"] == len(search["evaluations"])
        assert {"minimal", "heuristic", "maximal"} <= set(search["seeds"])
        measured = [entry["values"] for entry in search["evaluations"]]
        assert all(set(values) == set(recipe["search"]["objectives"]) for values in measured)
    if "finetune" in recipe:
        agreement = found["measured"]["agreement"]
        assert [pair["second"]["engine"] for pair in agreement] == ["openvino", "onnx"]


def test_finished_steps_are_kept(tiny_base: Path, tmp_path: Path, task: str) -> None:
    chosen, work = settings("hill_climbing", task), tmp_path / "work"
    with in_process():
        first = run_job(METHODS / "hill_climbing.yaml", work, chosen, base=tiny_base)
        again = run_job(METHODS / "hill_climbing.yaml", work, chosen, base=tiny_base)
        more = run_job(METHODS / "hill_climbing.yaml", work, (*chosen, "search.turns=2"), base=tiny_base)
    assert set(first["steps_seconds"]) == {"sparse", "int4", "adapter", "search", "exported", "measure"}
    assert again["steps_seconds"] == {} and again["search"] == first["search"]
    assert set(more["steps_seconds"]) == {"search", "exported", "measure"}
    assert len(list(work.glob("search-*.jsonl"))) == 1, "a longer search goes on with the same journal"
    with in_process():
        other = run_job(METHODS / "hill_climbing.yaml", work, (*chosen, "search.seed=1"), base=tiny_base)
    assert set(other["steps_seconds"]) == {"search", "exported", "measure"}
    assert len(list(work.glob("search-*.jsonl"))) == 2, "another seed is another search, with a journal of its own"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("shears", "sparsify=null", "section 'sparsify'"),
        ("sqft", "quantize=null", "section 'quantize'"),
        ("lora", "quantize={}", "nothing would use the INT4 one"),
        ("lora", "sparsify={}", "nothing would use the sparse one"),
        ("hill_climbing", "search=null", "section 'search'"),
        ("lora", "model=null", "give --base DIR"),
        ("lonas", "export.draft=searched", "section 'search'"),
        ("draft", "export.sub_adapter=searched", "does not choose export.sub_adapter"),
        ("nsga2", "export.draft=searched", "does not choose export.draft"),
        ("lora", "export.draft=minimal", "no search space to choose from"),
    ],
)
def test_jobs_whose_sections_do_not_fit_are_refused(name: str, change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run_job(METHODS / f"{name}.yaml", tmp_path / "work", (change,))
    assert message in str(caught.value) and not (tmp_path / "work").exists()


def test_the_document_has_one_line_per_recipe() -> None:
    text = (METHODS.parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    cells = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| ")]
    lines = [cell.strip("`") for cell in cells if cell.startswith("`")]
    assert sorted(lines) == NAMES
