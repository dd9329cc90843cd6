"""How small it became: per kind of tensor, bits per element as stored, as packed, and by entropy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparseport.transit.pieces import Uints

# Wider elements have too many values to be counted.
_COUNTED_BITS = 16
# More zeros than a dense model has in INT4, where up to a fifth of the codes round to the zero-point.
_SPARSE = 0.25


@dataclass(frozen=True)
class Tally:
    """One or several tensors of one element size.

    bits     of an element as stored
    tensors  how many
    elements of all of them
    zeros    elements that are 0, or equal to their zero-point
    packed   bytes in the archive
    entropy  bits that the elements of each tensor take by their frequencies alone; None if there are too many values
    """

    bits: int
    tensors: int
    elements: int
    zeros: int
    packed: int
    entropy: float | None

    @property
    def sparse(self) -> bool:
        """Whether so many elements are zeros that somebody must have pruned them."""
        return self.zeros >= _SPARSE * self.elements

    @property
    def packed_bits(self) -> float:
        """Bits per element in the archive."""
        return 8 * self.packed / self.elements

    @property
    def entropy_bits(self) -> float | None:
        """Bits per element by entropy."""
        return None if self.entropy is None else self.entropy / self.elements

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`; bits are per element."""
        return {
            "bits": self.bits,
            "sparse": self.sparse,
            "tensors": self.tensors,
            "elements": self.elements,
            "zeros": self.zeros / self.elements,
            "packed_bits": self.packed_bits,
            "entropy_bits": self.entropy_bits,
        }


class TensorTally:
    """Counts the pieces of one tensor."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._elements = self._zeros = self._packed = 0
        self._counts = np.zeros(1 << bits, np.int64) if bits <= _COUNTED_BITS else None

    def add(self, values: Uints, packed: int) -> None:
        """Count a piece: elements minus their zero-points, and its packed bytes."""
        self._elements += values.size
        self._zeros += values.size - int(np.count_nonzero(values))
        self._packed += packed
        if self._counts is not None:
            self._counts += np.bincount(values.reshape(-1), minlength=self._counts.size)

    def total(self) -> Tally:
        """What was counted."""
        entropy = None if self._counts is None else entropy_bits(self._counts)
        return Tally(self._bits, 1, self._elements, self._zeros, self._packed, entropy)


def entropy_bits(counts: Any) -> float:
    """Bits that n elements take whose values come with these frequencies: n times Shannon's entropy of order 0."""
    seen = np.asarray(counts, np.float64)
    seen = seen[seen > 0]
    return float(-(seen * np.log2(seen / seen.sum())).sum())


def by_kind(tensors: Iterable[Tally]) -> list[Tally]:
    """Sums over tensors of one element size, sparse and dense ones apart."""
    kinds: dict[tuple[int, bool], Tally] = {}
    for tensor in tensors:
        key = tensor.bits, not tensor.sparse
        kinds[key] = _sum(kinds[key], tensor) if key in kinds else tensor
    return [kinds[key] for key in sorted(kinds)]


def _sum(one: Tally, other: Tally) -> Tally:
    return Tally(
        bits=one.bits,
        tensors=one.tensors + other.tensors,
        elements=one.elements + other.elements,
        zeros=one.zeros + other.zeros,
        packed=one.packed + other.packed,
        entropy=None if one.entropy is None or other.entropy is None else one.entropy + other.entropy,
    )
