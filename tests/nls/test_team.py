"""Training with several processes: `accelerate launch` gives the adapter of one process, and one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from sparseport import cli  # noqa: E402
from sparseport.checkpoints.peft import AdapterFolder  # noqa: E402
from sparseport.errors import EnvironmentProblem, UsageError  # noqa: E402
from sparseport.nls.team import LaunchedTeam, Team, team_of  # noqa: E402

SRC = Path(cli.__file__).parents[1]
WORDS = ("ab", "cd", "efgh", "ij", "klmn", "op", "qr", "stuv")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
# `accelerate launch --cpu` starts one process whatever --num_processes says (several need MPI); this starts two.
ON_CPUS = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "words.jsonl"
    lines = [
        {"prompt": f"{split}: say {word}", "answer": f" {word * (number + 1)}", "split": split, "form": "text"}
        for split in ("train", "validation", "test")
        for number, word in enumerate(WORDS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def adapter_of(folder: Path) -> dict[str, np.ndarray]:
    with AdapterFolder.open(folder) as adapter:
        branches = {name: adapter.branch(name) for name in adapter.modules()}
        return {f"{n}.{p}": np.array(getattr(b, p)) for n, b in branches.items() for p in "ab"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "how"),
    [("lonas", ["--multi_gpu"]), ("sparse_peft", ["--use_fsdp", "--fsdp_version", "2"])],
    ids=["data parallel", "FSDP"],
)
def test_two_processes_make_the_adapter_of_one(method, how, tiny_base, tiny_sparse, task, tmp_path, capsys):
    """Items have answers of different lengths, so that a mean over processes is no mean over tokens."""
    base = tiny_base if method == "lonas" else tiny_sparse
    arguments = ["finetune", "--method", method, "--base", str(base), "--task", str(task), "--json", "--steps", "8"]
    for setting in (
        *("search_space=[8, 4]", "widths=[1.0, 0.5]", "heads=[2, 1]", "elastic_blocks=[0]", "batch_size=6"),
        *("dropout=0.0", "learning_rate=1.0e-2", "warmup_steps=2", "microbatches=2"),
    ):
        arguments += ["--set", setting]
    assert cli.main([*arguments, "--output", str(tmp_path / "one"), "--quiet"]) == 0
    alone = json.loads(capsys.readouterr().out)
    done = subprocess.run(
        [*LAUNCH, *how, "-m", "sparseport", *arguments, "--output", str(tmp_path / "two")],
        env=ON_CPUS, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    together = json.loads(done.stdout)  # one document: one process prints
    assert (alone["processes"], together["processes"]) == (1, 2)
    one, two = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert together["last_loss"] == pytest.approx(alone["last_loss"], rel=1e-4)
    moved = max(np.abs(value).max() for name, value in one.items() if name.endswith(".b"))
    assert moved > 0.02  # eight steps of 0.01
    for name, value in one.items():
        assert np.allclose(two[name], value, atol=moved / 200), name
    records = [(tmp_path / name / "training_record.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert records[0][0] == records[1][0] and len(records[0]) == 1 + 16
    for left, right in zip(*(map(json.loads, lines[1:]) for lines in records), strict=True):
        assert left["sizes"] == right["sizes"] and left["loss"] == pytest.approx(right["loss"], rel=1e-3)


@pytest.mark.slow
def test_an_output_that_exists_ends_all_processes(tiny_base, task, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    arguments = ["finetune", "--method", "lora", "--base", str(tiny_base), "--task", str(task), "--steps", "2"]
    done = subprocess.run(
        [*LAUNCH, "--multi_gpu", "-m", "sparseport", *arguments, "--output", str(tmp_path / "out")],
        env=ON_CPUS,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "output exists already" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


class Pair:
    """What accelerate does for two processes, in one: the other one's values are added."""

    def __init__(self, other: list[Any]) -> None:
        self.other = other

    def reduce(self, values: Any, how: str) -> Any:
        total = values + self.other.pop(0)
        return total / 2 if how == "mean" else total


def pair(other: list[Any]) -> LaunchedTeam:
    team = object.__new__(LaunchedTeam)
    team.index, team.count, team._sharded, team._accelerator = 1, 2, False, Pair(other)
    return team


def test_gradients_are_averaged_and_missing_ones_stay_missing():
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(3))]
    parameters.insert(1, torch.nn.Parameter(torch.zeros(5)))
    parameters[0].grad, parameters[2].grad = torch.full((2, 2), 3.0), torch.tensor([1.0, 2.0, 3.0])
    pair([torch.tensor([1.0] * 4 + [0.0, 0.0, -3.0])]).average(parameters)
    assert parameters[0].grad.tolist() == [[2.0, 2.0], [2.0, 2.0]] and parameters[1].grad is None
    assert parameters[2].grad.tolist() == [0.5, 1.0, 0.0]
    Team().average(parameters)
    assert parameters[2].grad.tolist() == [0.5, 1.0, 0.0]


def test_items_are_shared_out():
    parts = [SimpleNamespace(index=index, count=3) for index in range(3)]
    shares = [Team.part(part, list("abcdefg")) for part in parts]  # type: ignore[arg-type]
    assert sorted(item for share in shares for item in share) == list("abcdefg")
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 and Team().part([1, 2]) == [1, 2]


def test_one_process_needs_no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert type(team_of("float32")) is Team and team_of("float32").main
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(EnvironmentProblem, match="not installed") as caught:
        team_of("float32")
    assert "sparseport[distributed]" in caught.value.fix


@pytest.mark.parametrize(
    ("environment", "precision", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "float32", "different precisions"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "bfloat16", "different precisions"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "float32", "not supported"),
    ],
)
def test_launchers_that_want_something_else_are_refused(monkeypatch, environment, precision, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        team_of(precision)
