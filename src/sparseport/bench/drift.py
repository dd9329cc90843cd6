"""How far a runtime is from the model that was trained, at the very settings that are measured.

The reference is the dequantised model in torch, in float32, filled with the weights that a certified folder holds. Half
of the tokens are read in one go and half one at a time, because runtimes have other kernels for the two.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparseport.bench.subjects import Contender, Subject
from sparseport.child import Child
from sparseport.errors import BadInput, UsageError

F32 = npt.NDArray[np.float32]

TOKENS = 256
"""Tokens that are compared; one position in 256 is 0.4 % of top-1."""


def measure_drift(row: Contender, reference: Path, tokens: list[int], scratch: Path) -> dict[str, float]:
    """Mean KL divergence (nats), top-1 agreement and the largest difference of logits of a row from a reference.

    Args:
        row: what runs, and how.
        reference: file of logits that `write_reference` wrote for the same tokens.
        tokens: what is read.
        scratch: folder for a file in between.

    Raises:
        UsageError: the engine gives no logits.
    """
    from sparseport.verify.numerics import drift

    if row.engine == "torch":
        raise UsageError("torch is the reference itself", where=row.label)
    file = scratch / "logits.npy"
    request = {
        "engine": row.engine,
        "path": str(row.subject.path),
        "device": row.device,
        "settings": row.settings,
        "tokens": tokens,
        "output": str(file),
    }
    with Child(f"{__package__}.logits", request) as child:
        child.result()
    found, wanted = np.load(file, mmap_mode="r"), np.load(reference, mmap_mode="r")
    if found.shape != wanted.shape:
        raise BadInput(
            "this is another model than the reference", where=row.label, expected=wanted.shape, found=found.shape
        )
    measured = drift(np.asarray(wanted), np.asarray(found))
    return {name: float(value) for name, value in measured.items()}


def write_reference(subject: Subject, tokens: list[int], output: Path) -> None:
    """Write logits float32 [tokens, vocabulary] of the dequantised model of a certified folder.

    Raises:
        UsageError: sparseport did not export the folder, so that nothing says what it should compute.
    """
    if not subject.certified:
        raise UsageError(
            "drift is measured against the weights of a folder that sparseport exported",
            where=subject.path,
            fix="put such a folder first",
        )
    request = {"engine": "torch", "path": str(subject.path), "tokens": tokens, "output": str(output)}
    with Child(f"{__package__}.logits", {**request, "device": "CPU", "settings": {}}) as child:
        child.result()


def drift_tokens(subject: Subject, text: Path | None = None, count: int = TOKENS) -> list[int]:
    """Tokens of a text, by the folder's own tokenizer.

    Args:
        subject: a folder with `tokenizer.json`.
        text: what to read; sparseport's own calibration text by default.
        count: how many.

    Raises:
        BadInput: the folder has no tokenizer, or the text is too short.
    """
    from tokenizers import Tokenizer

    file = subject.path / "tokenizer.json"
    if not file.is_file():
        raise BadInput("the folder has no tokenizer.json, so that no text can be read", where=subject.path)
    source = files("sparseport").joinpath("nls").joinpath("calibration.txt") if text is None else text
    ids = Tokenizer.from_file(str(file)).encode(source.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if len(ids) < count:
        raise BadInput("the text is too short", where=text, expected=f"{count} tokens", found=len(ids))
    return list(ids[:count])
