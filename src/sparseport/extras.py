"""Which packages a target or a kind of search needs, and what to install if one is missing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from sparseport.errors import EnvironmentProblem

EXTRAS = {
    "openvino": ("nncf", "openvino", "openvino_tokenizers", "optimum", "torch", "transformers"),
    "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "torch", "transformers"),
    "search": ("pymoo", "matplotlib"),
    "distributed": ("ray",),
    "hub": ("huggingface_hub",),
    "pack": ("zstandard",),
}
"""Extra of this package (a target's has its name) -> packages that have to be there, by the names of imports."""

_USERS = {
    "search": "an evolutionary search or its picture",
    "distributed": "a search on Ray",
    "hub": "a push to a hub",
    "pack": "packing",
}


def require_packages(extras: Iterable[str]) -> None:
    """Refuse to start an export or a search that would fail at its end.

    Raises:
        EnvironmentProblem: names the first missing package, and the extra that brings it.
    """
    for extra in extras:
        for name in EXTRAS[extra]:
            if find_spec(name) is None:
                raise missing(name, extra)


def missing(name: str | None, extra: str) -> EnvironmentProblem:
    """The error for a package of an extra that is needed and not installed."""
    return EnvironmentProblem(
        f"{_USERS.get(extra, f'the target {extra}')} needs a package that is not installed",
        where=name,
        fix=f"pip install 'sparseport[{extra}]'",
    )
