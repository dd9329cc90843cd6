"""OpenVINO alone: the IR compiled, its KV cache as state, and the most likely token fed back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseport.bench.engines.session import SessionRunner
from sparseport.checkpoints.json_files import read_json
from sparseport.verify.sessions import OpenVinoSession


def load(path: Path, device: str, settings: dict[str, Any], threads: int) -> SessionRunner:
    """See `sparseport.bench.engines.load`."""
    import openvino as ov

    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    core = ov.Core()
    compiled = core.compile_model(core.read_model(path / "openvino_model.xml"), device, settings)
    vocabulary = int(read_json(path / "config.json", what="model config")["vocab_size"])
    return SessionRunner(OpenVinoSession(compiled), vocabulary)
