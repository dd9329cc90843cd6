"""Exports without child processes, so that many small ones do not load torch and trace the same graph again each time.

The steps are the same functions with the same requests; only the process boundary is left out, and a graph that was
traced before for the same config and the same small tensors is taken again. Exports with the real boundary and a fresh
graph are tested elsewhere (test_tiny_export, test_real_model).
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

FRONTEND = "sparseport.targets.openvino.frontend"
BUILDER = "sparseport.targets.onnx.builder"
STEPS = {
    FRONTEND: "build_frontend",
    BUILDER: "build_graph",
    "sparseport.verify.numerics": "compare_logits",
    "sparseport.verify.switched": "compare_switched",
    "sparseport.checkpoints.gguf": "_convert",
    "sparseport.targets.block_defaults": "compare_blocks",
    "sparseport.targets.openvino.nncf_step": "compress",
}
_USERS = (
    "sparseport.verify.judge",
    "sparseport.sources",
    "sparseport.cuts",
    "sparseport.compress",
    "sparseport.targets.openvino.writer",
    "sparseport.targets.onnx.writer",
)
_traced: dict[str, tuple[dict[str, Any], tempfile.TemporaryDirectory[str]]] = {}
LAST: dict[str, dict[str, Any]] = {}
"""Module of a step -> what it answered last."""


class InProcess:
    """Stands in for `sparseport.child.Child`."""

    def __init__(self, module: str, request: dict[str, Any]) -> None:
        self._module, self._request = module, request

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def result(self) -> dict[str, Any]:
        step = getattr(importlib.import_module(self._module), STEPS[self._module])
        once = self._module in (FRONTEND, BUILDER) and self._request["tokenizer"] is None
        result: dict[str, Any] = _trace_once(step, self._request) if once else step(**self._request)
        LAST[self._module] = result
        return result


def _trace_once(step: Any, request: dict[str, Any]) -> dict[str, Any]:
    config = json.loads(Path(request["config"]).read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    # The builder takes token ids from generation_config.json; OpenVINO's frontend takes small tensors.
    others = [Path(request["config"]).with_name("generation_config.json")]
    others += [Path(request[key]) for key in ("small_tensors",) if key in request]
    text = json.dumps(config, sort_keys=True).encode() + b"".join(path.read_bytes() for path in others)
    key = hashlib.sha256(step.__name__.encode() + text).hexdigest()
    output = Path(request["output"])
    if key not in _traced:
        answer = step(**request)
        kept = tempfile.TemporaryDirectory(prefix="skeleton-")
        shutil.copytree(output, kept.name, dirs_exist_ok=True)
        _traced[key] = (answer, kept)
    answer, kept = _traced[key]
    shutil.copytree(kept.name, output, dirs_exist_ok=True)
    return copy.deepcopy(answer)


@contextmanager
def in_process() -> Iterator[None]:
    """Run every step of an export in this process."""
    with ExitStack() as patches:
        for user in _USERS:
            patches.enter_context(mock.patch(f"{user}.Child", InProcess))
        yield
