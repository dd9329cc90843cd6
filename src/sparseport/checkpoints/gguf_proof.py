"""Proof that a converted folder holds the weights of a GGUF file, and what rounding them to the folder's dtype changed.

The conversion itself is not trusted: names, order of rows and rounding are done here a second time, a piece of one
tensor at a time. Blocks are dequantised by the package `gguf`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gguf_header import GgufFile, GgufTensor
from sparseport.checkpoints.gguf_model import Place
from sparseport.checkpoints.safetensors_header import numpy_dtype
from sparseport.errors import BadInput, FidelityError, Unsupported
from sparseport.weights.linear import F32, Array

_PIECE = 1 << 21  # values at a time
_STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_KEEP_ALL = "--gguf-dtype float32 keeps every value"


@dataclass(frozen=True)
class Rounding:
    """What the folder's dtype did to the values of a file.

    values   weights in the file
    rounded  those that are not the dequantised value any more
    """

    values: int
    rounded: int


def check_kinds(file: GgufFile) -> None:
    """Check that the package `gguf` can dequantise every block type of a file.

    Raises:
        Unsupported: it cannot; names a tensor.
    """
    for tensor in {tensor.kind: tensor for tensor in file.tensors.values()}.values():
        _values(file, tensor, 0, 1)


def prove(file: GgufFile, places: dict[str, Place], folder: Path, dtype: str) -> Rounding:
    """Compare every tensor of a converted folder with the file, bit for bit.

    Args:
        file: the GGUF file.
        places: the place of each of its tensors.
        folder: the converted folder.
        dtype: "float16", "bfloat16" or "float32", the dtype of every tensor in the folder.

    Raises:
        FidelityError: a tensor of the folder is missing, comes from nowhere, or is not the file's, rounded once.
        BadInput: the file holds NaN or Inf, or a weight overflows or becomes 0 in `dtype`.
    """
    values, rounded, vanished, first = 0, 0, 0, ""
    with ModelFolder.open(folder) as converted:
        expected = {place.name for place in places.values()}
        if set(converted.names()) != expected:
            raise FidelityError(
                "the converted folder does not hold the tensors of the GGUF file",
                where=file.path,
                expected=f"{len(expected)} tensors",
                found=", ".join(sorted(set(converted.names()) ^ expected)[:3]),
            )
        for name, place in places.items():
            where = f"{file.path}, {name} ({place.name})"
            ours = converted.read(place.name)
            _check_form(ours, place, dtype, where)
            for theirs, rows in _pieces(file, file.tensors[name], place):
                changed, zeroed = _compare(theirs, ours.reshape(-1, theirs.shape[1])[rows], where)
                values, rounded, vanished = values + theirs.size, rounded + changed, vanished + zeroed
                first = first or (where if zeroed else "")
            converted.release()
    if vanished:
        raise BadInput(
            f"{vanished} weights that are not 0 become 0 in {dtype}",
            where=first,
            expected="weights that the dtype can hold",
            fix=_KEEP_ALL,
            code="E_RANGE",
        )
    return Rounding(values, rounded)


def interleaved_rows(heads: int, rows: int) -> npt.NDArray[np.intp]:
    """Row of the Hugging Face tensor that each row of a GGUF query or key tensor holds.

    A head of d rows is d/2 pairs that are rotated together. Hugging Face stores the first members of all pairs and then
    the second ones; llama.cpp stores each pair side by side.
    """
    order: npt.NDArray[np.intp] = np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return order


def _pieces(file: GgufFile, tensor: GgufTensor, place: Place) -> Iterator[tuple[F32, slice | npt.NDArray[np.intp]]]:
    """Dequantised rows of a tensor as the folder has them, and which rows of its tensor they are."""
    order = interleaved_rows(place.heads, tensor.rows) if place.heads else None
    step = max(1, _PIECE // tensor.shape[-1])
    for start in range(0, tensor.rows, step):
        stop = min(start + step, tensor.rows)
        values = _values(file, tensor, start, stop)
        if place.plus_one:
            values = values - np.float32(1)
        yield values, slice(start, stop) if order is None else order[start:stop]


def _values(file: GgufFile, tensor: GgufTensor, start: int, stop: int) -> F32:
    """Rows [start, stop) dequantised: float32 [rows, columns]."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    stored = file.read_rows(tensor, start, stop)
    try:
        with np.errstate(all="ignore"):  # a damaged scale may be NaN or Inf; the result is checked
            values: F32 = dequantize(stored, GGMLQuantizationType[tensor.kind])
    except NotImplementedError as error:
        raise Unsupported(
            "this GGUF block type cannot be dequantised",
            where=f"{file.path}, tensor {tensor.name}",
            found=tensor.kind,
            fix="start from the model's Hugging Face folder instead",
        ) from error
    return values


def _check_form(ours: Array, place: Place, dtype: str, where: str) -> None:
    expected = numpy_dtype(_STORED[dtype], where)
    if ours.dtype != expected or ours.shape != place.shape:
        raise FidelityError(
            "a converted tensor has another form than the file's",
            where=where,
            expected=f"{expected} {place.shape}",
            found=f"{ours.dtype} {ours.shape}",
        )


def _compare(theirs: F32, ours: Array, where: str) -> tuple[int, int]:
    """Check a piece; how many values rounding changed, and how many it changed to 0."""
    dtype = ours.dtype
    if not np.isfinite(theirs).all():
        raise BadInput("the file holds NaN or Inf", where=where, fix="download the file again", code="E_NAN")
    with np.errstate(over="ignore", under="ignore"):
        once = theirs.astype(dtype)
    back = once.astype(np.float32)
    over = int((~np.isfinite(back)).sum())
    if over:
        raise BadInput(
            f"{over} weights are not finite in {dtype}",
            where=where,
            expected="finite weights",
            fix=_KEEP_ALL,
            code="E_RANGE",
        )
    bits = f"u{dtype.itemsize}"
    different = int(np.count_nonzero(once.view(bits) != np.ascontiguousarray(ours).view(bits)))
    if different:
        raise FidelityError(
            f"{different} converted weights are not the file's, rounded once to {dtype}",
            where=where,
            fix="report this file: its conversion cannot be trusted",
        )
    changed = back != theirs
    return int(np.count_nonzero(changed)), int(np.count_nonzero(changed & (back == 0)))
