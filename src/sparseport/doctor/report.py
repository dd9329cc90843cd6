"""The whole examination, as plain data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparseport import __version__
from sparseport.doctor import devices, machine, packages
from sparseport.doctor.conflicts import RULES, Problem, judge, packages_of
from sparseport.doctor.packages import NAMED, Installed
from sparseport.doctor.telemetry import telemetry

# The oldest that sparseport can run on, the newest that it is said to run on, and the one that it was tested with.
OLDEST_PYTHON, NEWEST_PYTHON, TESTED_PYTHON = (3, 10), (3, 12), (3, 11)


@dataclass(frozen=True)
class Report:
    """What was found; `problems` has the worst first."""

    problems: list[Problem]
    body: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return all(problem.level != "broken" for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"ok": self.ok, "problems": [problem.as_dict() for problem in self.problems], **self.body}


def examine(
    timeout: float = 60.0,
    with_devices: bool = True,
    on_runtime: Callable[[str], None] = lambda _: None,
    own_switches: frozenset[str] = frozenset(),
) -> Report:
    """Look at packages, machine and devices. Nothing is changed, and nothing goes over a network.

    Args:
        timeout: seconds that each runtime gets to say what it computes on.
        with_devices: whether runtimes are asked at all.
        on_runtime: called with the name of each runtime before it is asked.
        own_switches: environment variables that sparseport set itself, which say nothing about the user's choice.
    """
    installed, tested = packages.read_installed(), packages.read_tested()
    problems = [*_python(sys.version_info[:2]), *judge(installed.versions, facts(installed), tested)]
    problems += [*_doubled(installed), *_unmet(installed, problems)]
    found: dict[str, Any] = {}
    for runtime, brought_by in devices.BROUGHT_BY.items():
        if with_devices and any(name in installed.versions for name in brought_by):
            on_runtime(runtime)
            found[runtime] = devices.ask(runtime, timeout)
    if "openvino" in found:
        found["openvino"] = devices.with_missing(found["openvino"])
    problems += [_silent(runtime, answer["error"]) for runtime, answer in found.items() if "error" in answer]
    order = ("broken", "warning", "note")
    environment = {name: value for name, value in os.environ.items() if name not in own_switches}
    body = {
        "sparseport": __version__,
        "machine": machine.describe(),
        "packages": compared(installed.versions, tested),
        "purposes": packages.abilities(),
        "devices": found,
        "telemetry": telemetry(installed.versions, environment, Path.home()),
    }
    return Report(sorted(problems, key=lambda problem: order.index(problem.level)), body)


def compared(versions: Mapping[str, str], tested: Mapping[str, str]) -> list[dict[str, str | None]]:
    """Installed and tested version of each package that sparseport asks for; None where there is none.

    `state` is tested, other (than tested) or absent; a local part such as `+cpu` makes no difference.
    """
    rows: list[dict[str, str | None]] = []
    for name in NAMED:
        found, wanted = versions.get(name), tested.get(name)
        state = "absent" if found is None else "tested" if found.partition("+")[0] == wanted else "other"
        rows.append({"name": name, "installed": found, "tested": wanted, "state": state})
    return rows


def facts(installed: Installed, root: Path = machine.ROOT) -> dict[str, str]:
    """What rules ask beside versions: how PyTorch was built, against what the machine has. Imports nothing."""
    gpu, build = machine.has_nvidia_gpu(root), _torch_build(installed)
    if gpu is None or build is None:
        return {}
    version = f"torch {installed.versions['torch']}"
    if build and not gpu:
        return {"torch_cuda_without_gpu": f"{version} for CUDA {build}, no NVIDIA driver"}
    if gpu and not build:
        return {"torch_cpu_with_gpu": f"{version} without CUDA, an NVIDIA driver"}
    return {}


def _torch_build(installed: Installed) -> str | None:
    """The CUDA version that PyTorch was built for, an empty text for none; None if it is not known.

    The wheel's `torch/version.py` says it in a line `cuda: Optional[str] = '13.0'`.
    """
    if "torch" not in installed.versions:
        return None
    spec = find_spec("torch")
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        file = Path(folder) / "version.py"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        for line in lines:
            if line.startswith("cuda") and "=" in line:
                value = line.rpartition("=")[2].strip()
                return "" if value == "None" else value.strip("'\"")
    return None


def _python(version: tuple[int, ...]) -> list[Problem]:
    found, oldest, tested = (".".join(map(str, one)) for one in (version, OLDEST_PYTHON, TESTED_PYTHON))
    fix = f"make an environment with Python {tested}"
    if version < OLDEST_PYTHON:
        return [Problem("broken", "python", f"Python {oldest} or newer is needed", f"Python {found}", fix)]
    if version > NEWEST_PYTHON:
        what = f"sparseport was tested with Python {tested}; packages may have no wheels for a newer one yet"
        return [Problem("note", "python", what, f"Python {found}", fix)]
    return []


def _doubled(installed: Installed) -> list[Problem]:
    return [
        Problem(
            "warning",
            "installed-twice",
            f"metadata of several versions of {name} is installed; which files are there is not sure",
            ", ".join(versions),
            f"pip uninstall {name} until pip finds none, then install it again",
        )
        for name, versions in sorted(installed.doubled.items())
    ]


def _unmet(installed: Installed, known: list[Problem]) -> list[Problem]:
    """Requirements that installed packages have of each other and that do not hold, without those a rule speaks of."""
    lines = packages.unmet(installed)
    if lines is None:
        return []
    names = {problem.name for problem in known}
    covered = [packages_of(rule) for rule in RULES if rule.name in names]
    problems = []
    for owner, wanted, found in lines:
        about = packages.canonical(_name_of(wanted))
        if any({owner, about} <= both for both in covered):
            continue
        what, found = f"{owner} {installed.versions[owner]} asks for {wanted}", f"{about} {found}"
        problems.append(Problem("warning", "requirement", what, found, f"pip install '{wanted}'"))
    return problems


def _name_of(requirement: str) -> str:
    """`name>=1` without its specifier."""
    for at, character in enumerate(requirement):
        if character in "<>=!~":
            return requirement[:at]
    return requirement


def _silent(runtime: str, error: str) -> Problem:
    return Problem(
        "broken",
        "runtime",
        f"{runtime} is installed and cannot be asked what it computes on",
        error,
        f"reinstall it; `python -c 'import {runtime}'` shows the error",
    )
