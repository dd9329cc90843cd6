"""The Dockerfile, as far as it can be exercised without a container engine.

Exercised: its grammar and stage names; every COPY source exists and survives .dockerignore; every RUN line is valid
shell; the copied files alone build an installable package with the entry point; the RUN lines that prepare the file
system, in a scratch root with stand-ins for `useradd` and `chown`; the final user, working directory and entry point.
Not exercised: pulling the base image, downloading the dependencies inside it, ownership of files, and starting the
finished container.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Instruction:
    stage: int
    word: str
    value: str


def instructions() -> list[Instruction]:
    """The Dockerfile's instructions in order, continuation lines joined, comments dropped."""
    text = (REPO / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found, stage = [], -1
    for line in joined.splitlines():
        word, _, value = line.strip().partition(" ")
        stage += word == "FROM"
        found.append(Instruction(stage, word, value.strip()))
    return found


def values(word: str, stage: int | None = None) -> list[str]:
    return [i.value for i in instructions() if i.word == word and stage in (None, i.stage)]


def last_stage() -> int:
    return instructions()[-1].stage


def context_copies() -> list[tuple[list[str], str]]:
    """(sources, destination) of each COPY that reads the build context."""
    copies = [shlex.split(value) for value in values("COPY")]
    return [(parts[:-1], parts[-1]) for parts in copies if not parts[0].startswith("--from=")]


def in_build_context(path: str) -> bool:
    """Whether .dockerignore lets `path` through; the last matching pattern decides, a match on a parent counts."""
    rules = [line.strip() for line in (REPO / ".dockerignore").read_text(encoding="utf-8").splitlines()]
    parts = Path(path).parts
    candidates = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    kept = True
    for rule in rules:
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").strip("/")
        shallow = [c for c in candidates if c.count("/") == pattern.count("/")]
        deep = [c.rpartition("/")[2] for c in candidates] if pattern.startswith("**/") else []
        if fnmatch.filter(shallow, pattern) or fnmatch.filter(deep, pattern.removeprefix("**/")):
            kept = rule.startswith("!")
    return kept


def test_dockerignore_reading() -> None:
    assert in_build_context("src/sparseport/errors.py")
    assert in_build_context("pyproject.toml")
    assert not in_build_context("src/sparseport/__pycache__/errors.cpython-311.pyc")
    assert not in_build_context("tests/test_dockerfile.py")
    assert not in_build_context(".git/config")


def test_every_instruction_is_known() -> None:
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "LABEL", "RUN", "USER", "WORKDIR"}
    assert {i.word for i in instructions()} <= known


def test_stages_resolve() -> None:
    names: list[str] = []
    for i in instructions():
        if i.word == "FROM":
            image, _, name = i.value.partition(" AS ")
            assert image in names or re.fullmatch(r"[\w./-]+:[\w.-]+", image), f"{image} has no fixed tag"
            names.append(name)
        elif i.word == "COPY" and i.value.startswith("--from="):
            source = i.value.split()[0].removeprefix("--from=")
            assert source in names[: i.stage], f"COPY --from={source} names no earlier stage"
    assert len(values("FROM")) >= 2, "builder and runtime are separate stages"


def test_every_copy_source_reaches_the_build() -> None:
    assert context_copies()
    for sources, _ in context_copies():
        for source in sources:
            assert (REPO / source).exists(), f"{source} does not exist"
            assert in_build_context(source), f"{source} is excluded by .dockerignore"


@pytest.mark.parametrize("command", values("RUN"))
def test_run_lines_are_valid_shell(command: str) -> None:
    result = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_pip_leaves_no_cache() -> None:
    """Either pip is told so in the stage, or the stage is not the one that ships."""
    for i in instructions():
        if i.word == "RUN" and re.search(r"\bpip install\b", i.value):
            assert i.stage != last_stage()
            assert "PIP_NO_CACHE_DIR=1" in " ".join(values("ENV", i.stage))


def test_build_argument_is_declared_where_it_is_used() -> None:
    for i in instructions():
        for name in re.findall(r"\$\{(\w+)\}", i.value) if i.word == "RUN" else []:
            assert any(value.startswith(f"{name}=") for value in values("ARG", i.stage)), name


def test_runtime_is_unprivileged_and_starts_the_tool() -> None:
    stage = last_stage()
    user = values("USER", stage)[-1].partition(":")[0]
    assert user not in {"root", "0"}
    # A number lets an orchestrator check that the user is not root without reading the image's passwd file.
    assert user.isdigit()
    assert f"--uid {user}" in " ".join(values("RUN", stage))
    words = [i.word for i in instructions() if i.stage == stage]
    assert "RUN" not in words[words.index("USER") :]
    assert json.loads(values("ENTRYPOINT", stage)[-1]) == ["sparseport"]
    assert json.loads(values("CMD", stage)[-1]) == ["--help"]


def test_the_usage_example_can_write_and_parses() -> None:
    """The image's own user may not write into a bind mount of the caller's, so the example has to be somebody else."""
    from sparseport.cli import _parser

    comments = [line.lstrip("# ") for line in (REPO / "Dockerfile").read_text("utf-8").splitlines() if line[:1] == "#"]
    (build,) = [shlex.split(line) for line in comments if re.match("docker build -t", line)]
    (run,) = [shlex.split(line) for line in comments if line.startswith("docker run ")]
    image = run.index(build[build.index("-t") + 1])
    assert run[run.index("--user") + 1] == "$(id -u):$(id -g)" and run.index("--user") < image
    assert run[run.index("-v") + 1] == f"$PWD:{values('WORKDIR', last_stage())[-1]}"
    options = _parser().parse_args(run[image + 1 :])
    assert options.verb == "export" and not Path(options.output).is_absolute()


def test_the_comment_names_the_extras_of_the_image() -> None:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    text = (REPO / "Dockerfile").read_text("utf-8")
    match = re.search(r"^# Extras in the image: (.*)\. Not in it: (.*)\.$", text, re.M)
    assert match is not None
    there, missing = (re.findall(r"`(\w+)`", part.replace("`sparseport demo`", "")) for part in match.groups())
    (target,) = [w for value in values("RUN") for w in shlex.split(value) if w.startswith(".[")]
    assert there == target[2:-1].split(",")
    extras = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert set(there) | set(missing) == set(extras) and not set(there) & set(missing)


def test_copied_files_alone_build_the_package(tmp_path: Path) -> None:
    """The context that COPY brings is enough for pip to build and install, with every module and the entry point."""
    pytest.importorskip("setuptools")
    build, installed = tmp_path / "build", tmp_path / "installed"
    build.mkdir()
    for sources, destination in context_copies():
        for source in sources:
            copy_from_context(source, build / destination)
    (target,) = [w for value in values("RUN") for w in shlex.split(value) if w.startswith(".[")]
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command += ["-c", "constraints.txt", "--target", str(installed), target]
    result = subprocess.run(command, cwd=build, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (installed / "bin" / "sparseport").is_file()

    modules = {p.relative_to(REPO / "src") for p in (REPO / "src").rglob("*.py") if ".egg-info" not in str(p)}
    assert {module for module in modules if not (installed / module).is_file()} == set()
    # The plugin for optimum-cli lies in optimum's own namespace, which one __init__.py of ours would close.
    register = Path("optimum", "commands", "register")
    assert [path.relative_to(installed) for path in (installed / "optimum").rglob("*.py")] == [
        register / "register_sparseport.py"
    ]


def copy_from_context(source: str, destination: Path) -> None:
    origin = REPO / source
    if origin.is_file():
        shutil.copy(origin, destination)
        return
    for path in origin.rglob("*"):
        name = path.relative_to(REPO).as_posix()
        if path.is_file() and in_build_context(name):
            copy = destination / path.relative_to(origin)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def test_file_system_preparation_runs_and_declines_usage_data(tmp_path: Path) -> None:
    """Runs the final stage's RUN lines in a scratch root, then asks OpenVINO's own check how it reads the result."""
    root, stand_ins = tmp_path / "root", tmp_path / "bin"
    (root / "home").mkdir(parents=True)
    stand_ins.mkdir()
    # Newer Debian makes homes that only their owner may enter.
    for name, script in {
        "useradd": f'for last; do :; done; mkdir -m 700 "{root}/home/$last"',
        "chown": "exit 0",
    }.items():
        (stand_ins / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (stand_ins / name).chmod(0o755)
    for command in values("RUN", last_stage()):
        moved = re.sub(r"(?<![\w.])/(?=(home|data)\b)", f"{root}/", command)
        environment = {**os.environ, "PATH": f"{stand_ins}:{os.environ['PATH']}"}
        result = subprocess.run(["sh", "-ec", moved], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert (root / values("WORKDIR", last_stage())[-1].lstrip("/")).is_dir()
    # Under --user the record of consent is read by somebody who is not its owner.
    record = root / "home" / "sparseport" / "intel" / "openvino_telemetry"
    assert all(folder.stat().st_mode & 0o005 == 0o005 for folder in (record.parent, record.parent.parent))
    assert record.stat().st_mode & 0o004

    pytest.importorskip("openvino_telemetry")
    home = re.search(r"\bHOME=/(\S+)", " ".join(values("ENV", last_stage())))
    assert home is not None
    code = (
        "from openvino_telemetry.utils.opt_in_checker import OptInChecker as C\n"
        "print(C().check(enable_opt_in_dialog=False).name)"
    )
    silent = {key: value for key, value in os.environ.items() if key != "CI"}
    answer = subprocess.run(
        [sys.executable, "-c", code], env={**silent, "HOME": str(root / home[1])}, capture_output=True, text=True
    )
    assert answer.stdout.strip() == "DECLINED", answer.stderr
