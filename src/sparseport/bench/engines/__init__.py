"""One engine a file: `load(path, device, settings, threads)` gives something that generates.

A file's name, with `-` for `_`, is the engine's; `llama.cpp` and `torch` are the two whose names are no module's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

_MODULES = {
    "openvino-genai": ("openvino_genai", "openvino_genai", "pip install 'sparseport[openvino]'"),
    "openvino": ("openvino_raw", "openvino", "pip install 'sparseport[openvino]'"),
    "onnxruntime-genai": ("onnxruntime_genai", "onnxruntime_genai", "pip install 'sparseport[onnx]'"),
    "torch": ("torch_eager", "torch", "pip install 'sparseport[train]'"),
    "llama.cpp": ("llama_cpp", "llama_cpp", "pip install llama-cpp-python (it is compiled: half an hour on 2 cores)"),
}
"""Engine -> its file here, the package that it needs by the name of its import, and how to get that."""


@dataclass(frozen=True)
class Timing:
    """One generation.

    first_s  seconds from handing the prompt over until the first token is known
    rest_s   seconds for all tokens after it
    tokens   tokens generated, the first one included
    """

    first_s: float
    rest_s: float
    tokens: int


class Runner(Protocol):
    """A loaded model.

    vocabulary  tokens that it knows
    """

    vocabulary: int

    def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
        """Read a prompt and generate greedily, past any end token."""


def missing_engines() -> dict[str, str]:
    """Engines whose package is not installed -> how to get it."""
    return {engine: fix for engine, (_, package, fix) in _MODULES.items() if find_spec(package) is None}


def load(engine: str, path: Path, device: str, settings: Mapping[str, Any], threads: int) -> Runner:
    """Load a model in an engine.

    Args:
        engine: its name.
        path: a folder or file that it reads.
        device: a device's name, as the engine has it.
        settings: the engine's own, by its own names.
        threads: threads to compute with; 0 leaves it to the engine.
    """
    module = import_module(f"{__name__}.{_MODULES[engine][0]}")
    runner: Runner = module.load(path, device, dict(settings), threads)
    return runner
