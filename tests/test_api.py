"""The public names of the package: what is promised, that nothing can get in their way, and that they are typed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparseport

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "src" / "sparseport"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO / "src")}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def test_the_three_lists_agree() -> None:
    """What type checkers see, what is loaded, and what `import *` takes are the same names from the same modules."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typed = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == sparseport._PUBLIC
    assert sorted(sparseport._PUBLIC) == sparseport.__all__
    assert set(sparseport.__all__) <= set(dir(sparseport))


def test_no_public_name_is_that_of_a_module() -> None:
    """Importing `sparseport.verify.certificate` puts the package `verify` where a function of that name would be."""
    modules = {path.stem if path.suffix == ".py" else path.name for path in PACKAGE.iterdir()}
    assert {"verify", "bench", "plan", "export_"} & modules == {"verify", "bench", "plan"}
    assert set(sparseport.__all__) & modules == set()


def test_every_name_is_there_whatever_was_imported_before() -> None:
    """The order of imports must not decide what a name is; each is asked for twice."""
    code = """
import sparseport.bench.run, sparseport.verify.folder, sparseport.pipeline, sparseport.cli
import sparseport
light = [name for name in sparseport.__all__ if "nls" not in sparseport._PUBLIC[name]]
for name in light + light[::-1]:
    value = getattr(sparseport, name)
    assert callable(value), name
    assert value.__module__.startswith("sparseport."), name
print(*light)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert {"measure", "verify_export", "plan_export", "inspect", "run_job"} <= set(result.stdout.split())


def test_names_of_the_training_core_are_there() -> None:
    pytest.importorskip("torch")
    for name in ("evaluate", "compare", "Evaluation", "load_task"):
        assert callable(getattr(sparseport, name)), name


def test_a_name_that_does_not_exist_says_so() -> None:
    with pytest.raises(AttributeError, match="'sparseport' has no attribute 'verify_everything'"):
        _ = sparseport.verify_everything  # type: ignore[attr-defined]


def test_the_examples_are_type_checked_strictly(tmp_path: Path) -> None:
    """mypy holds examples/ to every flag of `--strict`: what they import of the public names has to be typed."""
    pytest.importorskip("mypy")
    result = mypy("examples")
    assert result.returncode == 0, result.stdout
    probe = tmp_path / "probe.py"
    probe.write_text("from sparseport import plan_export\nreveal_type(plan_export)\nplan_export(1)\n", encoding="utf-8")
    result = mypy(str(probe))
    assert "(recipe: sparseport.recipe.Recipe) -> sparseport.plan.Plan" in result.stdout
    assert 'incompatible type "int"; expected "Recipe"' in result.stdout


def mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", *arguments]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=900)
