"""Sparsity masks: True where a weight is kept. A sparse base gives the mask; trained weights never do."""

from __future__ import annotations

import numpy as np

from sparseport.weights.linear import U8, Array, DenseWeight, Mask, QuantizedWeight


def mask_of(values: Array) -> Mask:
    """The mask of a sparse base weight: True where the value is not zero (negative zero counts as zero)."""
    mask: Mask = values != 0
    return mask


def sparsity(mask: Mask) -> float:
    """Fraction of pruned weights, 0..1."""
    return 1.0 - float(np.count_nonzero(mask)) / mask.size


def revived(weight: DenseWeight | QuantizedWeight, mask: Mask) -> int:
    """How many pruned weights are not exactly zero: code != zero_point, or value != 0.

    For a `QuantizedWeight` with `input_order`, `mask` is in the model's own column order.
    """
    if isinstance(weight, DenseWeight):
        return int(np.count_nonzero((weight.values != 0) & ~mask))
    stored = mask if weight.input_order is None else mask[:, weight.input_order]
    off_zero = weight.codes != np.repeat(weight.zero_points, weight.group_size, axis=1)
    return int(np.count_nonzero(off_zero & ~stored))


def keeps_n_m(mask: Mask, n: int, m: int) -> bool:
    """Whether every aligned block of `m` input columns keeps at most `m - n` weights (N:M: n of m are zero)."""
    out, cols = mask.shape
    if cols % m:
        return False
    kept = mask.reshape(out, cols // m, m).sum(axis=2)
    return bool((kept <= m - n).all())


def pack_bitmask(mask: Mask) -> U8:
    """A mask bool [out, in] as bits uint8 [out, ceil(in/8)]: column 8j+k at bit k of byte j, filled with zeros."""
    return np.packbits(mask, axis=1, bitorder="little")


def unpack_bitmask(bits: U8, columns: int) -> tuple[Mask, int]:
    """Inverse of `pack_bitmask`: the mask bool [out, columns], and how many bits are set beyond the last column."""
    every = np.unpackbits(bits, axis=1, bitorder="little").view(np.bool_)
    return np.ascontiguousarray(every[:, :columns]), int(np.count_nonzero(every[:, columns:]))


def find_n_m(mask: Mask) -> tuple[int, int] | None:
    """The tightest common N:M pattern (N of every M input columns pruned) that a mask keeps: 2:4 or 4:8, else None."""
    return next((pattern for pattern in ((2, 4), (4, 8)) if keeps_n_m(mask, *pattern)), None)
