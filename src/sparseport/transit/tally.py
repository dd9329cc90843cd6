"""How small it became: per kind of tensor, bits per element as stored, as packed, and by entropy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparseport.transit.pieces import Uints

# Wider elements have too many values to be counted.
_COUNTED_BITS = 16


@dataclass
class Tally:
    """Sums over the tensors of one element size that were packed on their own; repeated ones are not counted again.

    bits     of an element as stored
    tensors  how many
    elements all of them together
    zeros    elements that are 0, or equal to their zero-point
    packed   bytes in the archive
    entropy  bits that the elements of each tensor take by their frequencies alone, summed; None if not counted
    """

    bits: int
    tensors: int = 0
    elements: int = 0
    zeros: int = 0
    packed: int = 0
    entropy: float | None = None
    _counts: Any = field(default=None, repr=False)

    def add(self, values: Uints, packed: int) -> None:
        """Count a piece of the current tensor: elements minus their zero-points, and its packed bytes."""
        self.elements += values.size
        self.zeros += values.size - int(np.count_nonzero(values))
        self.packed += packed
        if self.bits <= _COUNTED_BITS:
            counts = np.bincount(values.reshape(-1), minlength=1 << self.bits)
            self._counts = counts if self._counts is None else self._counts + counts

    def close(self) -> None:
        """The current tensor is complete."""
        self.tensors += 1
        if self._counts is not None:
            self.entropy = (self.entropy or 0.0) + entropy_bits(self._counts)
            self._counts = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`; bits are per element."""
        return {
            "stored_bits": self.bits,
            "tensors": self.tensors,
            "elements": self.elements,
            "zeros": self.zeros / self.elements,
            "packed_bits": 8 * self.packed / self.elements,
            "entropy_bits": None if self.entropy is None else self.entropy / self.elements,
        }


def entropy_bits(counts: Any) -> float:
    """Bits that n elements take whose values come with these frequencies: n times Shannon's entropy of order 0."""
    seen = np.asarray(counts, np.float64)
    seen = seen[seen > 0]
    return float(-(seen * np.log2(seen / seen.sum())).sum())
