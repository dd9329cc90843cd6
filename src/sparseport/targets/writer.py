"""What every target's writer does, so that one merge can feed several of them, and what they share."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from sparseport.errors import BadInput, Unsupported
from sparseport.weights.digest import value_digest
from sparseport.weights.layouts import GroupLayout
from sparseport.weights.linear import Array, DenseWeight, LowRankBranch, QuantizedWeight

# Rows converted at a time, so that a large embedding is never copied whole.
_ROWS = 1024


class TargetWriter(Protocol):
    """Takes merged weights one at a time and writes one runtime's folder.

    versions  packages that made the graph, after `save`
    left_out  small tensors that the model has no place for and that change nothing, after `save`
    notes     sentences for the user, after `save`
    around    what the graph around the weights was built as, after `save`; see `GraphReader.around`
    """

    versions: dict[str, str]
    left_out: list[str]
    notes: list[str]
    around: dict[str, Any]

    def add_linear(self, module: str, weight: QuantizedWeight | DenseWeight, layout: GroupLayout | None) -> None:
        """Store a linear layer's weight; a quantised one in the groups of `layout`."""
        ...

    def add_branch(self, module: str, branch: LowRankBranch) -> None:
        """Store the un-merged branch of a linear layer that was added, as `weights.branch.stored_branch` gives it."""
        ...

    def add_tensor(self, name: str, values: Array) -> dict[str, Any]:
        """Store an embedding, head or other matrix; returns what the certificate says of a form that is not its own."""
        ...

    def save(self) -> None:
        """Wait for the graph, put the weights in and write every file of the folder but the certificate."""
        ...

    def certified(self) -> dict[str, dict[str, Any]]:
        """After `save`: what the certificate says of linear layers and tensors beyond their values, by name."""
        ...

    def __enter__(self) -> TargetWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def without_place(small: Mapping[str, Array], placed: set[str]) -> list[str]:
    """Small tensors of the checkpoint that the graph has no place for, if all of them change nothing.

    AutoGPTQ writes a bias of zeros for layers that have none; such a tensor is left out, with a note.

    Raises:
        Unsupported: one of them is not all zeros.
    """
    left_out = []
    for name, values in small.items():
        if name in placed:
            continue
        if not name.endswith(".bias") or values.any():
            raise Unsupported(
                "the model has no place for this tensor",
                where=name,
                fix="check that config.json belongs to the weights",
            )
        left_out.append(name)
    return left_out


def as_stored(values: Array, precision: str, name: str) -> tuple[Array, int]:
    """An embedding or head as it will be stored, and how many of its values that changes.

    Args:
        values: [vocabulary, hidden], any float dtype.
        precision: fp16, fp32, or int8 (which starts from fp16).
        name: tensor name, for messages.

    Raises:
        BadInput: a value is not finite, or overflows float16.
    """
    if values.dtype == np.float16 or precision == "fp32":
        stored = values if values.dtype == np.float16 and precision != "fp32" else values.astype(np.float32)
        _check_finite(stored, name)
        return stored, 0
    stored = np.empty(values.shape, np.float16)
    changed = 0
    for start in range(0, values.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        wide = values[rows].astype(np.float32)
        _check_finite(wide, name)
        with np.errstate(over="ignore", under="ignore"):
            stored[rows] = wide.astype(np.float16)
        if not np.isfinite(stored[rows]).all():
            raise BadInput("tensor overflows float16", where=name, fix="give --embedding fp32", code="E_OVERFLOW")
        changed += int(np.count_nonzero(stored[rows].astype(np.float32) != wide))
    return stored, changed


def f16_or_f32(values: Array, name: str) -> Array:
    """A small tensor in float16 if it is, else in float32.

    Raises:
        BadInput: a value is not finite.
    """
    if not np.isfinite(values.astype(np.float32)).all():
        raise BadInput("tensor holds NaN or Inf", where=name, code="E_NAN")
    return values if values.dtype == np.float16 else values.astype(np.float32)


def plus_one_facts(values: Array) -> dict[str, Any]:
    """What the certificate says of a small tensor that a graph holds plus 1, as Gemma's norms multiply.

    Args:
        values: the checkpoint's, any float dtype; 1 is added in float32.
    """
    return {"added": 1, "value_sha256": value_digest(values.astype(np.float32) + np.float32(1))}


def _check_finite(values: Array, name: str) -> None:
    for start in range(0, values.shape[0], _ROWS):
        if not np.isfinite(values[start : start + _ROWS].astype(np.float32)).all():
            raise BadInput("tensor holds NaN or Inf", where=name, code="E_NAN", fix="download or train the base again")
