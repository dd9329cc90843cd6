"""`optimum-cli export sparseport` is `sparseport export`: the same options, exit codes, errors and folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")

from optimum.commands import optimum_cli

from e2e.in_process import in_process
from sparseport import cli
from sparseport.verify.folder import verify

SRC = Path(__file__).resolve().parents[2] / "src"
Run = Callable[..., tuple[int, str, str]]

# What optimum-cli loads for its help, with sparseport there and with one that cannot be imported.
HELP = """
import json, sys
if sys.argv.pop() == "broken":
    sys.modules["sparseport"] = None
from optimum.commands.optimum_cli import main
status = 0
try:
    main()
except SystemExit as leave:
    status = leave.code
heavy = ("torch", "transformers", "openvino", "onnx", "onnxruntime", "numpy", "pydantic", "nncf", "rich", "yaml")
print(json.dumps({"status": status, "loaded": [name for name in heavy if name in sys.modules]}))
"""


@pytest.fixture
def optimum(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Exit status, standard output and standard error of `optimum-cli export sparseport ...`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "sparseport", *map(str, arguments)])
        with pytest.raises(SystemExit) as leave:
            optimum_cli.main()
        out, err = capsys.readouterr()
        return int(leave.value.code or 0), out, err

    return run


@pytest.fixture
def ours(capsys: pytest.CaptureFixture[str]) -> Run:
    """The same of `sparseport export ...`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = cli.main(["export", *map(str, arguments)])
        except SystemExit as leave:
            status = int(leave.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def optimum_help(*arguments: str, sparseport: str) -> tuple[dict[str, Any], str, str]:
    """What a process of its own says of itself, what it printed before that, and its standard error."""
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    environment.pop("TRANSFORMERS_VERBOSITY", None)  # optimum's warnings follow it, and earlier tests may have set it
    command = [sys.executable, "-c", HELP, *arguments, "--help", sparseport]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    *out, facts = done.stdout.splitlines()
    return json.loads(facts), "\n".join(out), done.stderr


def test_the_command_is_found_and_costs_the_others_nothing() -> None:
    """Fails if the plugin is not in optimum's namespace, or if it loads something that optimum-cli does not load."""
    there, out, err = optimum_help("export", sparseport="there")
    assert there["status"] == 0 and "sparseport" in out and "openvino" in out and "not there" not in err
    broken, out, err = optimum_help("export", sparseport="broken")
    assert broken["status"] == 0 and "openvino" in out and "  sparseport" not in out
    assert "optimum-cli export sparseport` is not there" in err and err.count("ModuleNotFoundError") == 1
    assert there["loaded"] == broken["loaded"] and "torch" not in there["loaded"]


def test_options_are_those_of_the_verb(optimum: Run, ours: Run) -> None:
    (status, theirs, _), (_, own, _) = optimum("--help"), ours("--help")

    def words(text: str) -> set[str]:
        return {word.strip("[],") for word in text.split() if word.strip("[],").startswith("-")}

    assert status == 0 and words(theirs) - words(own) == {"-m", "--model"} and words(own) <= words(theirs)
    assert "optimum-cli export sparseport -m " in theirs


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 2),
        (["--base", "b"], 2),
        (["--base", "none", "--output", "out"], 3),
        (["--base", "none", "--output", "out", "--json"], 3),
        (["--base", "none", "--output", "out", "--set", "surprise=1"], 3),
        (["--config", "none.yaml", "--output", "out"], 3),
    ],
)
def test_errors_are_those_of_the_verb(
    optimum: Run, ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs, own = optimum(*arguments), ours(*arguments)
    assert theirs == own and theirs[0] == status and theirs[2].startswith("error[E_")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_parse_is_2(optimum: Run) -> None:
    status, out, err = optimum("--target", "tensorrt")
    assert status == 2 and out == "" and "invalid choice: 'tensorrt'" in err
    status, out, err = optimum("-m", "none", "one", "--output", "two")
    assert status == 2 and "error[E_USAGE]: the output is named twice" in err and "one" in err and "two" in err


def test_the_folder_is_the_one_that_the_verb_makes(
    optimum: Run, ours: Run, tmp_path: Path, tiny_int4: Path, tiny_sparse: Path, tiny_adapter: Path
) -> None:
    rest = ["--sparse-base", tiny_sparse, "--adapter", tiny_adapter, "--no-tokenizer", "--no-numerics", "--quiet"]
    with in_process():
        assert optimum("-m", tiny_int4, tmp_path / "theirs", *rest)[0] == 0
        assert ours("--base", tiny_int4, "--output", tmp_path / "ours", *rest)[0] == 0
    assert verify(tmp_path / "theirs").ok
    found = [(tmp_path / name / "sparseport.json").read_bytes() for name in ("theirs", "ours")]
    assert found[0] == found[1]
