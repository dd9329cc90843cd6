"""docs/certificate.md explains every key that a certificate can have, and no other.

Keys are found in the code that writes them; tests/test_examples.py holds the page against certificates of exports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pytest

from docs.certificate_keys import documented, keys_of, unexplained
from docs.markdown_text import REPO

SOURCES = REPO / "src" / "sparseport"
# Functions that write a part of a certificate -> how the page writes that part.
WRITERS = {
    ("evidence.py", "linear_facts"): ("linears.*",),
    ("evidence.py", "for_target"): ("linears.*",),
    ("evidence.py", "totals"): ("totals",),
    ("branches.py", "branch_facts"): ("branch",),
    ("compress.py", "_facts"): ("linears.*", "tensors.*"),
    ("pipeline.py", "_add_tensors"): ("tensors.*",),
    ("pipeline.py", "_prove"): ("", "numerics"),
    ("targets/onnx/writer.py", "add_tensor"): ("tensors.*",),
    ("targets/onnx/writer.py", "certified"): ("linears.*", "tensors.*"),
    ("verify/certificate.py", "file_facts"): ("files.*",),
    ("verify/numerics.py", "compare_logits"): ("numerics", "numerics.*"),
    ("verify/numerics.py", "drift"): ("numerics.*",),
    ("verify/numerics.py", "judged"): ("numerics.*",),
    ("verify/switched.py", "_chosen"): ("numerics.*",),
}


def written(file: str, function: str) -> set[str]:
    """Keys of dictionaries that a function makes (`outer.inner` for nested ones), and keys that it sets."""
    tree = ast.parse((SOURCES / file).read_text(encoding="utf-8"))
    (body,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
    set_here = {
        str(target.slice.value)
        for node in ast.walk(body)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant)
    }
    return set_here | set(_made(body, ""))


def _made(node: ast.AST, prefix: str) -> Iterator[str]:
    if not isinstance(node, ast.Dict):
        for child in ast.iter_child_nodes(node):
            yield from _made(child, prefix)
        return
    for key, value in zip(node.keys, node.values, strict=True):
        inner = prefix
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield prefix + key.value
            inner = f"{prefix}{key.value}."
        yield from _made(value, inner)


@pytest.mark.parametrize(("file", "function"), WRITERS)
def test_every_key_that_is_written_is_explained(file: str, function: str) -> None:
    told = documented()
    found = written(file, function)
    assert found, "the function writes nothing any more: name the one that does"
    for key in sorted(found):
        places = [f"{place}.{key}".removeprefix(".") for place in WRITERS[file, function]]
        assert any(place in told or any(path.startswith(f"{place}.") for path in told) for place in places), key


def test_no_key_is_explained_that_nothing_writes() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.py"))
    last = {path.rpartition(".")[2] for path in documented()} - {"*", "adapter *", "with *", "without *"}
    assert [key for key in sorted(last) if f'"{key}"' not in text and f'"{key}"' not in text.replace("'", '"')] == []


def test_every_top_level_key_is_explained() -> None:
    body = {key for key in written("pipeline.py", "_export") if "." not in key} - {
        "dataset",
        "sha256",
        "super_network_sha256",
    }
    assert {"schema", "target", "recipe", "inputs", "versions"} <= body <= documented()
    assert {"proof_sha256", "certificate_sha256"} <= documented()


def test_paths_of_a_certificate_are_written_as_on_the_page() -> None:
    branch = {"rank": 4, "readback": {"onnx": "d"}}
    certificate: dict[str, Any] = {
        "recipe": {"onnx": {"format": "nbits"}},
        "inputs": {"base": {"config.json": "d"}, "adapter second": {"x": "d"}},
        "linears": {"model.layers.0.q": {"branch": branch, "compression_error_steps": {"max": "1"}}},
        "adapters": {"a.safetensors": {"model.layers.0.q": branch}},
        "numerics": {"run": True, "with a.safetensors": {"settings": {"x": "1"}, "kl": "0"}, "default": {"kl": "0"}},
    }
    assert keys_of(certificate) - {"linears.*.branch", "adapters.*", "adapters.*.*"} == {
        *("recipe", "inputs", "inputs.base", "inputs.adapter *", "linears", "linears.*", "adapters", "numerics"),
        *("linears.*.compression_error_steps", "linears.*.compression_error_steps.max"),
        *("branch.rank", "branch.readback", "branch.readback.*"),
        *("numerics.run", "numerics.with *", "numerics.with *.settings", "numerics.with *.kl", "numerics.default"),
        "numerics.default.kl",
    }
    assert unexplained(certificate) == []
    certificate["linears"]["model.layers.0.q"]["surprise"] = 1
    assert "linears.*.surprise" in unexplained(certificate)
