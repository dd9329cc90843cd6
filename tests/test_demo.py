"""The demo's frame: what it may replace, what it repeats, what it measures, and how it judges; no model is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport import cli, demo
from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import OutputExists, VerificationError
from sparseport.job import inputs
from sparseport.recipe import make_recipe
from sparseport.verify import folder as verify_folder
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import Verdict

STEPS = ("base", "sparse", "int4", "adapter")
TABLE = [{"model": "m", "accuracy": "1.0%", "size": "2 MiB", "sparsity": "3.0%"}]
MEASURED = {
    "task": "t",
    "items": 1,
    "table": TABLE,
    "code_differences": {"codes": 1000, "different": 0},
    "same_answers": 1,
    "example": {"prompt": "p", "answer": "a", "wanted": "a"},
}


@pytest.fixture
def job(tmp_path, repo_root):
    """The real demo recipe, with a task file of our own."""
    task = tmp_path / "task.jsonl"
    task.write_text("first version")
    text = (repo_root / "export_configs" / "demo.yaml").read_text(encoding="utf-8")
    path = tmp_path / "job.yaml"
    path.write_text(text.replace("task: home-commands", f"task: {json.dumps(str(task))}"), encoding="utf-8")
    return path


@pytest.fixture
def made(monkeypatch):
    """Steps that write one small file instead of working; the list says which ran."""
    ran: list[str] = []

    def step(name: str, out: Path) -> None:
        ran.append(name)
        out.mkdir(exist_ok=True)
        (out / "made.txt").write_text(str(len(ran)))
        if name == "openvino":
            (out / "sparseport.json").write_text("{}")

    monkeypatch.setattr(demo, "hide_library_bars", lambda: None)
    monkeypatch.setattr(inputs, "require_space", lambda job, base: None)
    monkeypatch.setattr(inputs, "make_base", lambda source, out, *rest: step("base", out))
    monkeypatch.setattr(inputs, "_sparse", lambda job, made, out, progress: step("sparse", out))
    monkeypatch.setattr(inputs, "_int4", lambda job, made, out, progress: step("int4", out))
    monkeypatch.setattr(inputs, "_adapter", lambda finetune, made, out, progress: step("adapter", out))
    monkeypatch.setattr(demo, "_export", lambda recipe, out, progress: step("openvino", out))
    monkeypatch.setattr(demo, "_measure", lambda *rest: ran.append("measure") or MEASURED)
    monkeypatch.setattr(verify_folder, "verify", lambda folder: Verdict(folder, 9, 4, 3))
    return ran


def run(job: Path, work_dir: Path, made: list[str], *settings: str) -> list[str]:
    """The steps that a run repeats."""
    made.clear()
    demo.run_demo(job, work_dir, settings)
    return list(made)


# --- what it may replace ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STEPS, "openvino"])
def test_a_folder_of_the_users_is_never_replaced(job, made, tmp_path, name):
    work = tmp_path / "models"
    (work / name).mkdir(parents=True)
    (work / name / "model.safetensors").write_text("precious")
    with pytest.raises(OutputExists) as caught:
        run(job, work, made)
    assert caught.value.exit_code == 6 and caught.value.where == str(work / name) and "--work-dir" in caught.value.fix
    assert made == [] and [path.relative_to(work).as_posix() for path in work.rglob("*")] == [
        name,
        f"{name}/model.safetensors",
    ]


def test_a_folder_put_there_between_two_runs_is_not_replaced_either(job, made, tmp_path):
    work = tmp_path / "demo"
    run(job, work, made)
    for path in (work / "int4").iterdir():
        path.unlink()
    (work / "int4" / "mine.txt").write_text("precious")
    with pytest.raises(OutputExists, match="int4"):
        run(job, work, made, "sparsify.sparsity=0.6")
    assert made == [] and (work / "int4" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("content", ["[1]", '{"lr": 0.1}', "not json", ""])
def test_a_state_file_of_another_program_is_left_alone(job, made, tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(OutputExists, match=r"state\.json"):
        run(job, tmp_path, made)
    assert made == [] and (tmp_path / "state.json").read_text() == content


def test_a_file_under_a_steps_name_is_refused(job, made, tmp_path):
    (tmp_path / "sparse").write_text("mine")
    with pytest.raises(OutputExists, match="sparse"):
        run(job, tmp_path, made)
    assert made == [] and (tmp_path / "sparse").read_text() == "mine"


def test_other_files_in_the_folder_do_not_matter(job, made, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "adapter").mkdir()  # empty: nothing to lose
    assert run(job, tmp_path, made) == [*STEPS, "openvino", "measure"]
    assert (tmp_path / "llama").is_dir()


def test_a_run_killed_before_its_record_was_written_goes_on(job, made, tmp_path):
    run(job, tmp_path / "demo", made)
    (tmp_path / "demo" / "state.json").unlink()
    assert run(job, tmp_path / "demo", made) == [*STEPS, "openvino", "measure"]


# --- what it repeats -------------------------------------------------------------------------------------------------


def test_a_second_run_repeats_nothing(job, made, tmp_path):
    first = demo.run_demo(job, tmp_path / "demo")
    assert made == [*STEPS, "openvino", "measure"] == list(first["steps_seconds"])
    made.clear()
    again = demo.run_demo(job, tmp_path / "demo")
    assert made == [] and again["steps_seconds"] == {} and again["table"] == first["table"]


@pytest.mark.parametrize(
    ("setting", "first"),
    [
        ("model.member=other.gguf", "base"),
        ("sparsify.sparsity=0.6", "sparse"),
        ("sparsify.samples=3", "sparse"),
        ("finetune.task=home-commands", "sparse"),
        ("quantize.method=gptq", "int4"),
        ("finetune.steps=3", "adapter"),
        ("export.embedding=int8", "openvino"),
    ],
)
def test_a_change_repeats_what_depends_on_it(job, made, tmp_path, setting, first):
    order = [*STEPS, "openvino", "measure"]
    run(job, tmp_path / "demo", made)
    assert run(job, tmp_path / "demo", made, setting) == order[order.index(first) :]
    assert run(job, tmp_path / "demo", made, setting) == []


def test_a_task_file_that_changed_repeats_its_calibration(job, made, tmp_path):
    run(job, tmp_path / "demo", made)
    (tmp_path / "task.jsonl").write_text("second version")
    assert run(job, tmp_path / "demo", made) == ["sparse", "int4", "adapter", "openvino", "measure"]


@pytest.mark.parametrize("emptied", [False, True])
def test_a_folder_that_was_removed_is_made_again(job, made, tmp_path, emptied):
    run(job, tmp_path / "demo", made)
    shutil.rmtree(tmp_path / "demo" / "int4")
    if emptied:
        (tmp_path / "demo" / "int4").mkdir()
    assert run(job, tmp_path / "demo", made) == ["int4", "adapter", "openvino", "measure"]


def test_finished_steps_are_kept_when_a_later_one_fails(job, made, tmp_path, monkeypatch):
    def fail(*rest: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(inputs, "_int4", fail)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(job, tmp_path / "demo")
    assert made == ["base", "sparse"]
    assert run(job, tmp_path / "demo", made) == ["int4", "adapter", "openvino", "measure"]


# --- how it judges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("differences", [[], ["openvino_model.bin: content changed"]])
def test_differences_fail_the_command_after_the_table(job, made, tmp_path, monkeypatch, capsys, as_json, differences):
    monkeypatch.setattr(verify_folder, "verify", lambda folder: Verdict(folder, 9, 4, 3, differences))
    arguments = ["demo", "--quiet", "--config", str(job), "--work-dir", str(tmp_path / "demo")]
    status = cli.main([*arguments, "--json"] if as_json else arguments)
    out, err = capsys.readouterr()
    assert status == (5 if differences else 0)
    assert ("content changed" in err and "error[E_VERIFY]" in err) if differences else err == ""
    if as_json:
        document = json.loads(out)
        assert document["table"] == TABLE and document["differences"] == differences
        assert document.get("error", {}).get("code") == ("E_VERIFY" if differences else None)
    else:
        assert "3.0%" in out and f"verify: {len(differences)} differences in 9 files, 4 linear layers" in out


def test_the_judge_names_the_folder(tmp_path):
    verdict = Verdict(tmp_path, 9, 4, 3, ["a: missing"])
    result = {"folder": str(tmp_path), "verify": verdict.as_dict()}
    with pytest.raises(VerificationError, match="a: missing") as caught:
        demo.require_verified(result)
    assert caught.value.where == str(tmp_path)


# --- what it measures ------------------------------------------------------------------------------------------------


def test_sparsity_is_counted_in_the_files(tiny_base, tiny_sparse, tiny_int4):
    with ModelFolder.open(tiny_sparse) as sparse:
        pruned, total = _zeros(sparse)
    assert pruned * 2 == total  # the fixture prunes half of each row
    assert demo.dense_sparsity(tiny_base) < 0.001
    assert demo.dense_sparsity(tiny_sparse) == 0.5
    recipe = make_recipe(
        {"base": tiny_int4, "sparse_base": tiny_sparse, "output": "unused", "sub_adapter": "heuristic"}
    )
    assert demo.int4_sparsity(recipe) == 0.5
    # The same INT4 weights against a base without pruned weights: what rounds to zero is no sparsity.
    assert demo.int4_sparsity(recipe.model_copy(update={"sparse_base": tiny_base})) < 0.001


def test_a_weight_that_came_back_is_no_sparsity(tiny_sparse, tiny_int4, monkeypatch):
    recipe = make_recipe({"base": tiny_int4, "sparse_base": tiny_sparse, "output": "unused"})
    from sparseport.sources import Sources

    plain = Sources.quantized

    def revive(self: Sources, module: str) -> Any:
        weight = plain(self, module)
        return type(weight)(**{**vars(weight), "codes": np.full_like(weight.codes, 16)})

    monkeypatch.setattr(Sources, "quantized", revive)
    assert demo.int4_sparsity(recipe) == 0.0


@pytest.mark.parametrize(
    ("totals", "share"),
    [
        ({"pruned": 30, "revived": 0, "masked_weights": 100}, 0.3),
        ({"pruned": 30, "revived": 10, "masked_weights": 100}, 0.2),
        ({"pruned": 0, "revived": 0, "masked_weights": 0}, 0.0),
    ],
)
def test_sparsity_of_a_certificate_is_that_of_its_totals(totals, share):
    assert demo.certified_sparsity(totals) == pytest.approx(share)


def test_what_was_read_back_is_counted_from_the_certificate():
    from sparseport.show import read_back

    layers = {
        "same": {"weight_sha256": "a", "readback": {"openvino": "a"}},
        "compressed": {"weight_sha256": "a", "compressed_sha256": "b", "readback": {"openvino": "b"}},
        "other": {"weight_sha256": "a", "readback": {"openvino": "b"}},
        "not read": {"weight_sha256": "a", "readback": {}},
    }
    assert read_back(Certificate({"linears": layers})) == (2, 4)
    assert read_back(Certificate({"linears": {}})) == (0, 0)


def _zeros(folder: ModelFolder) -> tuple[int, int]:
    weights = [folder.read(f"{name}.weight") for name in folder.linear_names() if name != folder.head_name]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.size for weight in weights)
