"""Which packages a target needs, and what to install if one is missing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from sparseport.errors import EnvironmentProblem

EXTRAS = {
    "openvino": ("nncf", "openvino", "openvino_tokenizers", "optimum", "torch", "transformers"),
    "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "torch", "transformers"),
}
"""Extra of this package, which has its target's name -> packages that have to be there, by the names of imports."""


def require_packages(targets: Iterable[str]) -> None:
    """Refuse to start an export that would fail at its end.

    Raises:
        EnvironmentProblem: names the first missing package, and the extra that brings it.
    """
    for target in targets:
        for name in EXTRAS[target]:
            if find_spec(name) is None:
                raise missing(name, target)


def missing(name: str | None, target: str) -> EnvironmentProblem:
    """The error for a package that a target needs and that is not installed."""
    return EnvironmentProblem(
        f"the target {target} needs a package that is not installed",
        where=name,
        fix=f"pip install 'sparseport[{target}]'",
    )
