"""Logits of one row, in a process of its own: `drift` compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparseport.verify.sessions import OpenVinoSession, Session

F32 = npt.NDArray[np.float32]


def write_logits(
    engine: str, path: str, device: str, settings: dict[str, Any], tokens: list[int], output: str
) -> dict[str, Any]:
    """Write float32 [tokens, vocabulary] as a .npy file: half of the tokens in one go, the rest one at a time."""
    folder, half = Path(path), max(len(tokens) // 2, 1)
    if engine == "torch":
        logits = _reference(folder, tokens)
    elif engine == "llama.cpp":
        logits = _llama_cpp(folder, settings, tokens, half)
    else:
        session = _session(engine, folder, device, settings)
        logits = np.concatenate([session.read(tokens[:half]), *(session.read([token]) for token in tokens[half:])])
    np.save(output, logits.astype(np.float32))
    return {"tokens": len(logits)}


def _reference(folder: Path, tokens: list[int]) -> F32:
    from sparseport.targets.read_back import open_reader
    from sparseport.verify.certificate import Certificate
    from sparseport.verify.numerics import logits_of, reference_of

    return logits_of(reference_of(folder, open_reader(Certificate.read(folder).target, folder)), tokens)


def _session(engine: str, folder: Path, device: str, settings: dict[str, Any]) -> Session:
    """OpenVINO's engines compute alike; so do onnxruntime-genai and ONNX Runtime with the same session options."""
    if engine == "onnxruntime-genai":
        from sparseport.verify.runs import open_onnx

        return open_onnx(folder, threads=int(settings.get("intra_op_num_threads", 0)))
    import openvino as ov

    core = ov.Core()
    return OpenVinoSession(core.compile_model(core.read_model(folder / "openvino_model.xml"), device, settings))


def _llama_cpp(path: Path, settings: dict[str, Any], tokens: list[int], half: int) -> F32:
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=len(tokens), logits_all=True, verbose=False, **settings)
    model.eval(tokens[:half])
    for token in tokens[half:]:
        model.eval([token])
    return np.array(model.scores[: len(tokens)], np.float32)


if __name__ == "__main__":
    from sparseport.child import serve

    serve(write_logits)
