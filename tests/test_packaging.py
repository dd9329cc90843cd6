"""The package as a whole: light to import, built in floors, without cycles, without traces of a developer's machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

REPO = Path(__file__).resolve().parents[1]
SRC = REPO / "src"
PACKAGE = SRC / "sparseport"

# Lowest first. A package imports only from floors below its own, and from itself.
FLOORS = (
    {"errors", "figures", "layout", "machine", "offline"},
    {"extras"},
    {"child", "progress", "publish", "ray_cluster"},
    {"strict", "weights"},
    {"search_recipe", "training_recipe"},
    {"recipe"},
    {"checkpoints", "stored_forms"},
    {"targets"},
    {"merge", "verify"},
    {"model_card", "selection"},
    {"sources"},
    {"branches", "cuts", "fitting"},
    {"further"},
    {"plan"},
    {"evidence", "merging", "networks"},
    {"compress"},
    {"inspection", "pipeline", "nls", "transit"},
    {"job", "report"},
    {"bench", "chat", "demo", "doctor", "integrations", "show"},
    {"verbs"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {name: height for height, names in enumerate(FLOORS) for name in names}

# What the extras bring; the core has to import without any of it.
HEAVY = {
    *("accelerate", "datasets", "gguf", "nncf", "onnx", "onnxruntime", "onnxruntime_genai", "openvino"),
    *("openvino_genai", "openvino_tokenizers", "optimum", "peft", "safetensors", "tokenizers", "torch", "transformers"),
    *("huggingface_hub", "matplotlib", "pymoo", "ray", "zstandard"),
}
# The training core subclasses torch modules, and plugins subclass their hosts: they may need the extras at import.
MAY_BE_HEAVY = ("sparseport.nls", "sparseport.integrations")


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    return subprocess.run(
        [sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True, timeout=300
    )


def module_level_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import that runs, or is read by a type checker, outside a function body."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            if target == "sparseport":
                yield from ((node.lineno, f"sparseport.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, target
        pending.extend(ast.iter_child_nodes(node))


def test_import_is_light() -> None:
    result = run_python("import sys, sparseport; print(*{name.partition('.')[0] for name in sys.modules})")
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "sparseport" in loaded
    assert not loaded & HEAVY


def test_every_module_imports_first_and_without_the_extras() -> None:
    """A cycle shows only for some import orders, so each module once is the first of the package to be imported."""
    names = [module_name(path) for path in source_files() if path.name != "__main__.py"]
    code = """
import importlib, sys
heavy, lenient, names = (arg.split(",") for arg in sys.argv[1:])
sys.modules.update(dict.fromkeys(heavy))  # None makes `import name` raise ModuleNotFoundError
for name in names:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "sparseport"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        root = (error.name or "").partition(".")[0]
        if root not in heavy or not name.startswith(tuple(lenient)):
            print(name, repr(error))
    except Exception as error:
        print(name, repr(error))
"""
    result = run_python(code, ",".join(sorted(HEAVY)), ",".join(MAY_BE_HEAVY), ",".join(names))
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_every_module_has_a_floor() -> None:
    tops = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in source_files()} - {"__init__"}
    assert tops - set(FLOOR_OF) == set(), "name a floor for these in FLOORS"


def test_each_floor_imports_only_floors_below() -> None:
    wrong = []
    for path in source_files():
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for line, target in module_level_imports(path):
            parts = target.split(".")
            if parts[0] != "sparseport" or len(parts) == 1 or parts[1] == own or parts[1] not in FLOOR_OF:
                continue
            if FLOOR_OF[parts[1]] >= FLOOR_OF.get(own, len(FLOORS)):
                wrong.append(f"{path.relative_to(REPO)}:{line} imports {target}")
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from sparseport.cli import main", ["sparseport.cli"]),
        ("from sparseport import cli", ["sparseport.cli"]),
        ("import sparseport.cli as c", ["sparseport.cli"]),
        ("from ..cli import main", ["sparseport.cli"]),
        ("from .. import cli", ["sparseport.cli"]),
        ("from . import mask", ["sparseport.weights"]),
        ("try:\n    import sparseport.cli\nexcept ImportError:\n    pass", ["sparseport.cli"]),
        ("class A:\n    import sparseport.cli", ["sparseport.cli"]),
        ("def f():\n    import sparseport.cli", []),
    ],
)
def test_the_import_reader_sees_every_form(
    source: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SRC", tmp_path)
    path = tmp_path / "sparseport" / "weights" / "probe.py"
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    assert [target for _, target in module_level_imports(path)] == expected


def test_source_files_stay_readable_in_one_sitting() -> None:
    lengths = {str(p.relative_to(REPO)): len(p.read_text(encoding="utf-8").splitlines()) for p in SRC.rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines >= 500} == {}


def tracked_files() -> list[Path]:
    """Files that are, or are about to be, in the repository."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    files = [REPO / os.fsdecode(name) for name in listing.stdout.split(b"\0") if name]
    return [path for path in files if path.is_file()]


def machine_traces() -> set[str]:
    """Strings that belong to the machine the tests run on: where the tree lies, where its pip gets packages from."""
    slash = "/"  # written apart, so that this file does not contain what it looks for
    traces = {str(REPO), slash + "work/", slash + "root/", slash + "tmp/setup"}
    if str(Path.home()).count(slash) > 1:
        traces.add(str(Path.home()) + slash)
    settings = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings += "\n".join(value for key, value in os.environ.items() if key.upper().startswith(("PIP_", "UV_", "NPM_")))
    for url in re.findall(r"https?://[^\s'\"\\,]+", settings):
        host = urlsplit(url).hostname
        if host and host not in {"localhost", "127.0.0.1"} and "." in host:
            traces.add(host)
    return traces


def test_tree_is_free_of_machine_traces() -> None:
    traces = [trace.encode() for trace in machine_traces()]
    found = []
    for path in tracked_files():
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if any(trace in line for trace in traces):
                found.append(f"{path.relative_to(REPO)}:{number}")
    assert found == []


def pyproject() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> dict[str, Requirement]:
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def version_of(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "==", f"{pin} is not an exact version"
    return specifier.version


def test_constraints_are_exact_sorted_and_without_local_builds() -> None:
    names = [pin.name for pin in pins().values()]
    assert names == sorted(names, key=canonicalize_name)
    assert [pin for pin in pins().values() if "+" in version_of(pin)] == []


def test_constraints_satisfy_every_requirement_and_each_other() -> None:
    """Walks the dependencies of what is installed, as a resolver would, and holds every pin against every range."""
    project = pyproject()["project"]
    direct = [project["dependencies"], *project["optional-dependencies"].values()]
    pinned, seen, wrong = pins(), set(), []
    pending = [Requirement(text) for group in direct for text in group]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in pinned and not requirement.specifier.contains(version_of(pinned[name]), prereleases=True):
            wrong.append(f"{requirement} against {pinned[name]}")
        try:
            needs = [] if (name, frozenset(requirement.extras)) in seen else metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            needs = []
        seen.add((name, frozenset(requirement.extras)))
        parsed = [Requirement(text) for text in needs]
        extras = {"", *requirement.extras}
        pending.extend(r for r in parsed if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras))
    assert wrong == []
    assert set(pinned) <= {name for name, _ in seen}, "pins that nothing asks for"


def test_pytorch_is_pinned_to_one_version_everywhere() -> None:
    pin = f"torch=={version_of(pins()['torch'])}"
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    dockerfile = (REPO / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^TORCH_INSTALL \?= (.*)$", makefile, re.M) == [pin]
    assert re.findall(r'^ARG TORCH_INSTALL="(.*)"$', dockerfile, re.M) == [pin]


def test_version_is_written_once() -> None:
    project = pyproject()
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "sparseport.__version__"}
    import sparseport

    text = sparseport.__version__
    places = [
        p for p in tracked_files() if p.suffix in {".py", ".toml", ".cfg"} and f'"{text}"' in p.read_text("utf-8")
    ]
    assert places == [PACKAGE / "__init__.py"]


def test_console_script_points_at_a_function() -> None:
    target = pyproject()["project"]["scripts"]["sparseport"]
    module, _, function = target.partition(":")
    result = run_python(f"import {module} as m; assert callable(m.{function})")
    assert result.returncode == 0, result.stderr


def test_ci_entry_is_executable_and_make_lists_its_targets() -> None:
    assert os.access(REPO / ".ci" / "run", os.X_OK)
    listing = subprocess.run(["make"], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert listing.returncode == 0, listing.stderr
    for target in ("env", "demo", "test", "lint", "bench", "clean"):
        assert re.search(rf"^\s+make {target}\b", listing.stdout, re.M), target


@pytest.mark.parametrize("switch", ["CI", "NNCF_CI", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"])
def test_make_keeps_the_frameworks_silent(switch: str) -> None:
    """The variables reach the commands that make runs, whatever the caller's environment says."""
    probe = f"include Makefile\nprobe:\n\t@printenv {switch}\n"
    # The tests themselves may run under make, whose own variables would make the inner one talk.
    environment = {key: value for key, value in os.environ.items() if key != switch and "MAKE" not in key}
    result = subprocess.run(
        ["make", "--no-print-directory", "-f", "-", "probe"],
        cwd=REPO,
        input=probe,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout.strip() == {"CI": "true"}.get(switch, "1"), result.stderr
