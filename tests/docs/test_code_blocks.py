"""Python in the documentation compiles, and every name that it takes from a library exists there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.markdown_text import REPO, Block, blocks, documents

# Heavy, or made at import: their names are looked for in the text of the package that states them.
_LAZY = {"optimum.intel": "__init__.py", "transformers": "__init__.py"}
# Wants an environment of its own.
_ELSEWHERE = {"optimum.onnxruntime"}


def python_blocks() -> list[Block]:
    return [block for path in documents() for block in blocks(path) if block.language == "python"]


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.place)
def test_blocks_compile_and_their_names_exist(block: Block) -> None:
    tree = ast.parse(block.code, block.place)
    assert list(unknown(tree)) == []


def unknown(tree: ast.Module) -> Iterator[str]:
    """Names that an import or an attribute of an imported module asks for and that are not there, or are modules and
    are called."""
    modules: dict[str, str] = {}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name.partition(".")[0]] = alias.name
                if not there(alias.name):
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module not in _ELSEWHERE and node.module != "__future__":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if not has(str(node.module), alias.name) or (
                    alias.name in called and name.startswith("sparseport") and there(name)
                ):
                    yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and not has(module, node.attr):
                yield f"{module}.{node.attr}"


def there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def has(module: str, name: str) -> bool:
    """Whether a module has a name; a library that is not installed is skipped."""
    if not there(module):
        if module.partition(".")[0] == "sparseport":
            return False
        pytest.skip(f"{module} is not installed")
    if module in _LAZY:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        return name in Path(spec.origin).read_text(encoding="utf-8")
    found = importlib.import_module(module)
    return hasattr(found, name) or there(f"{module}.{name}")


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("import sparseport\nsparseport.export\nsparseport.nonsense", ["sparseport.nonsense"]),
        ("from sparseport import export, verify_everything", ["sparseport.verify_everything"]),
        ("from sparseport.weights.digest import digest", []),
        ("from sparseport.nowhere import digest", ["sparseport.nowhere.digest"]),
        ("import sparseport.verify.folder\nfrom sparseport import verify\nverify('out')", ["sparseport.verify"]),
        ("import numpy as np\nnp.float16\nnp.float17", ["numpy.float17"]),
    ],
)
def test_the_reader_finds_what_is_missing(code: str, missing: list[str]) -> None:
    assert list(unknown(ast.parse(code))) == missing


def test_the_digest_by_hand_is_the_digest() -> None:
    """docs/numerics.md states what a digest is taken of, and its block computes one both ways."""
    (block,) = [block for block in python_blocks() if block.path == REPO / "docs" / "numerics.md"]
    assert "assert digest(" in block.code
    exec(compile(block.code, block.place, "exec"), {})
