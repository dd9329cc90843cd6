"""The verb `doctor`: what it needs, what it survives, and its exit status."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparseport.cli import main
from sparseport.doctor import devices, report
from sparseport.doctor.devices import ask, with_missing
from sparseport.doctor.packages import Installed

# Core packages and what they need themselves.
CORE = ("ml_dtypes", "numpy", "pydantic", "PyYAML", "rich", "markdown_it_py", "mdurl", "Pygments", "pydantic_core")
CORE = (*CORE, "annotated_types", "typing_extensions", "typing_inspection")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a runtime that child processes import in place of the real one."""
    source = str(Path(report.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path / "fake"), source)))

    def write(name: str, code: str) -> None:
        (tmp_path / "fake").mkdir(exist_ok=True)
        (tmp_path / "fake" / f"{name}.py").write_text(code)

    return write


OPENVINO = """
class Core:
    available_devices = ["CPU", "GPU.0", "GPU.1"]
    def get_property(self, name, key):
        return {"FULL_DEVICE_NAME": f" Some {name} ", "OPTIMIZATION_CAPABILITIES": ["INT8", "FP32"]}[key]
def get_version():
    return "2026.4.1-x"
"""


def test_a_runtime_is_asked_in_a_process_of_its_own(fake: Any) -> None:
    fake("openvino", OPENVINO)
    found = with_missing(ask("openvino", 60))
    assert found["version"] == "2026.4.1-x" and [one["name"] for one in found["devices"]] == ["CPU", "GPU.0", "GPU.1"]
    assert found["devices"][1] == {"name": "GPU.0", "full_name": "Some GPU.0", "capabilities": ["FP32", "INT8"]}
    assert set(found["missing"]) == {"NPU"}  # a second GPU makes GPU.0 of GPU


@pytest.mark.parametrize(
    ("code", "timeout", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 60, "crashed (SIGSEGV)"),
        ("import time; time.sleep(600)", 0.5, "no answer within 0.5 s"),
        ("raise RuntimeError('driver too old')", 60, "driver too old"),
        ("import no_such_library", 60, "no_such_library"),
    ],
)
def test_a_runtime_that_breaks_is_told_and_breaks_nothing_else(
    fake: Any, code: str, timeout: float, words: str
) -> None:
    fake("torch", code)
    answer = ask("torch", timeout)
    assert words in answer["error"]
    assert with_missing(answer) == answer


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that other packages are installed, and that runtimes say something."""

    def pretend(versions: dict[str, str], answers: dict[str, Any] | None = None) -> None:
        installed = Installed(versions, dict.fromkeys(versions, ()), {})
        monkeypatch.setattr(report.packages, "read_installed", lambda: installed)
        monkeypatch.setattr(devices, "ask", lambda runtime, timeout: (answers or {})[runtime])

    return pretend


def doctor(capsys: Any, *options: str) -> tuple[int, dict[str, Any], str]:
    status = main(["doctor", "--json", "--quiet", *options])
    out, err = capsys.readouterr()
    return status, json.loads(out), err


def test_nothing_broken_is_0(capsys: Any, environment: Any) -> None:
    environment(
        {"numpy": "2.4.6", "nncf": "3.4.0", "torch": "9.9+cpu"}, {"torch": {"version": "9", "devices": ["cpu"]}}
    )
    status, said, err = doctor(capsys)
    assert status == 0 and said["ok"] and err == "" and "error" not in said
    assert [problem["name"] for problem in said["problems"]] == ["nncf-torchao"]
    states = {row["name"]: row["state"] for row in said["packages"]}
    assert (states["numpy"], states["torch"], states["openvino"]) == ("tested", "other", "absent")
    assert set(said["devices"]) == {"torch"} and said["telemetry"]["sparseport"].startswith("sends nothing")


def test_something_broken_is_8_and_comes_first(capsys: Any, environment: Any) -> None:
    environment({"nncf": "3.4.0", "onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"})
    status, said, err = doctor(capsys, "--no-devices")
    assert status == 8 and not said["ok"] and said["devices"] == {}
    assert [problem["level"] for problem in said["problems"]] == ["broken", "note"]
    assert said["error"]["exit_code"] == 8 and "error[E_BROKEN]" in err and "onnxruntime-twice" in err


def test_a_runtime_that_cannot_be_asked_is_broken(capsys: Any, environment: Any) -> None:
    answers = {"openvino": {"error": "crashed (SIGSEGV)"}, "onnxruntime": {"version": "1", "providers": ["CPU"]}}
    environment({"openvino": "2026.4.1", "onnxruntime-directml": "1.31.1"}, answers)
    status, said, _ = doctor(capsys)
    (problem,) = said["problems"]
    assert status == 8 and problem["found"] == "crashed (SIGSEGV)" and "openvino" in problem["what"]
    assert set(said["devices"]) == {"openvino", "onnxruntime"}


def test_requirements_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that speaks of the same two packages says more."""
    versions = {"optimum-intel": "2.1.0", "safetensors": "0.8.0", "torchvision": "1", "torch": "2", "torchao": "1"}
    requires = {**dict.fromkeys(versions, ()), "optimum-intel": ("safetensors<0.8.0", "torch>=3")}
    monkeypatch.setattr(report.packages, "read_installed", lambda: Installed(versions, requires, {}))
    found = report.examine(with_devices=False)
    assert [(problem.name, problem.level) for problem in found.problems] == [
        ("optimum-intel-safetensors", "broken"),
        ("requirement", "warning"),
    ]
    assert "torch>=3" in found.problems[1].fix


def test_the_table_for_people(capsys: Any, environment: Any) -> None:
    answer = {
        "version": "2026.4.1",
        "devices": [{"name": "CPU", "full_name": "A \x1b[31mCPU", "capabilities": ["INT8"]}],
    }
    environment({"openvino": "2026.4.1", "openvino-genai": "2025.1"}, {"openvino": answer})
    assert main(["doctor", "--quiet"]) == 8
    out = capsys.readouterr().out
    assert "no GPU:" in out and "A \\x1b[31mCPU" in out and "\x1b[31mCPU" not in out
    assert "openvino-releases" not in out and "different releases" in out and "pip install openvino==" in out


@pytest.mark.parametrize(
    ("version", "level"), [((3, 9), "broken"), ((3, 10), None), ((3, 12), None), ((3, 13), "note"), ((4, 0), "note")]
)
def test_versions_of_python(version: tuple[int, int], level: str | None, repo_root: Path) -> None:
    found = report._python(version)
    assert [problem.level for problem in found] == ([level] if level else [])
    text = (repo_root / "pyproject.toml").read_text(encoding="utf-8")
    oldest, newest = (".".join(map(str, one)) for one in (report.OLDEST_PYTHON, report.NEWEST_PYTHON))
    assert f'requires-python = ">={oldest}"' in text
    assert re.findall(r"Python :: (3\.\d+)", text)[-1] == newest


@pytest.mark.parametrize("timeout", ["0", "-1", "nan"])
def test_a_time_limit_that_is_none(capsys: Any, timeout: str) -> None:
    assert main(["doctor", "--timeout", timeout]) == 2
    assert "--timeout" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cuda", "gpu", "fact"),
    [
        ("'13.0'", False, {"torch_cuda_without_gpu"}),
        ("'13.0'", True, set()),
        ("None", True, {"torch_cpu_with_gpu"}),
        ("None", False, set()),
        ("None", None, set()),
    ],
)
def test_how_torch_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str, gpu: bool | None, fact: set[str]
) -> None:
    (tmp_path / "version.py").write_text(
        f"__version__ = '2.13.0'\ndebug = False\ncuda: Optional[str] = {cuda}\nhip = 1\n"
    )
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(report, "find_spec", lambda name: spec)
    monkeypatch.setattr(report.machine, "has_nvidia_gpu", lambda root: gpu)
    assert set(report.facts(Installed({"torch": "2.13.0"}, {}, {}))) == fact
    assert report.facts(Installed({}, {}, {})) == {}


def test_this_torch_says_how_it_was_built() -> None:
    """Held against what running the file gives; importing torch for it would take seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        pytest.skip("torch is not installed")
    said = runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"]
    assert report._torch_build(Installed({"torch": "2"}, {}, {})) == (said or "")


def _child(code: list[str], path: str) -> subprocess.CompletedProcess[str]:
    keep = {name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR") if name in os.environ}
    return subprocess.run(
        [sys.executable, *code], env={**keep, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_it_works_with_nothing_optional_installed(tmp_path: Path) -> None:
    """An environment of links to the core packages alone."""
    for name in CORE:
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            source = Path(str(importlib.metadata.distribution(name).locate_file(top)))
            if top not in ("..", "__pycache__") and not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(source)
    source_folder = str(Path(report.__file__).parents[2])
    done = _child(
        ["-S", "-m", "sparseport", "doctor", "--json", "--quiet"], os.pathsep.join((str(tmp_path), source_folder))
    )
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["ok"] and said["problems"] == [], done.stderr
    states = {row["name"]: row["state"] for row in said["packages"]}
    assert states["torch"] == states["openvino"] == "absent" and states["numpy"] != "absent"
    assert not any(one["ready"] for one in said["purposes"]) and said["devices"] == {}


def test_versions_are_read_without_importing_anything_heavy() -> None:
    code = (
        "import sys; from sparseport.doctor.report import examine; examine(with_devices=False);"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = _child(["-c", code], str(Path(report.__file__).parents[2]))
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "openvino", "onnxruntime", "onnxruntime_genai", "transformers", "huggingface_hub", "optimum"}
    assert heavy & {name for name in heavy if find_spec(name)} and not heavy & set(done.stdout.split())
