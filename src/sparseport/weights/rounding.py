"""Named rounding rules: the only place where a real number becomes an integer code.

All rules round half to even, which is what `torch.round` and `numpy.rint` do.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

import numpy as np

from sparseport.errors import BadInput
from sparseport.weights.linear import F32, U8, Array, QuantizedWeight

# Rows compared at a time, so that a large matrix is never widened whole.
_ROWS_AT_A_TIME = 256


class RoundingRule(str, Enum):
    """How a merged real weight is put on a frozen INT4 grid (s = scale, z = zero-point).

    SQFT    clamp(round((w + z*s) / s), 0, 2^b - 1), with z*s rounded in the scale's dtype: what the SQFT training code
            computes, so models trained with it are reproduced bit for bit
    PAPER   clamp(round(w / s) + z, 0, 2^b - 1): eq. 3 of the SQFT paper (arXiv 2410.03750)

    The two differ where w/s is a tie and z is odd, and where z*s is rounded.
    """

    SQFT = "sqft"
    PAPER = "paper"


def quantize_to_grid(
    values: F32, scales: Array, zero_points: U8, group_size: int, rule: RoundingRule = RoundingRule.SQFT, bits: int = 4
) -> U8:
    """Put real weights on a frozen grid.

    Args:
        values: float32 [out, in], columns in the grid's (stored) order.
        scales: [out, groups], any float dtype.
        zero_points: uint8 [out, groups].
        group_size: columns per group.
        rule: the rounding rule.
        bits: width of a code.

    Returns:
        uint8 codes [out, in].

    Raises:
        BadInput: a value is NaN or infinite, or z*s overflows the scale's dtype.
    """
    if not np.isfinite(values).all():
        raise BadInput("weights to quantise hold NaN or Inf", found=int((~np.isfinite(values)).sum()), code="E_NAN")
    out, cols = values.shape
    grouped = values.reshape(out, cols // group_size, group_size)
    scale = scales.astype(np.float32)[:, :, None]
    if rule is RoundingRule.SQFT:
        with np.errstate(over="ignore"):
            product: Array = np.multiply(zero_points.astype(scales.dtype), scales)
        offset = product.astype(np.float32)[:, :, None]
        if not np.isfinite(offset).all():
            raise BadInput("zero_point * scale overflows the scale's dtype", where=str(scales.dtype), code="E_SCALE")
        codes = grouped + offset
        codes /= scale
        np.rint(codes, out=codes)
    else:
        codes = grouped / scale
        np.rint(codes, out=codes)
        codes += zero_points.astype(np.float32)[:, :, None]
    np.clip(codes, 0, 2**bits - 1, out=codes)
    return codes.astype(np.uint8).reshape(out, cols)


def dequantize(weight: QuantizedWeight) -> F32:
    """Return the real weight float32 [out, in], columns in the model's own input order.

    scales * (codes - zero_points); exact for float16 and bfloat16 scales (at most 15 significant bits), rounded once
    for float32 scales.
    """
    out, cols = weight.shape
    steps = weight.codes.reshape(out, -1, weight.group_size).astype(np.float32)
    steps -= weight.zero_points.astype(np.float32)[:, :, None]
    steps *= weight.scales.astype(np.float32)[:, :, None]
    stored = steps.reshape(out, cols)
    if weight.input_order is None:
        return stored
    natural = np.empty_like(stored)
    natural[:, weight.input_order] = stored
    return natural


# float16: the smallest normal number, and half of the distance between the numbers below it.
_LEAST_NORMAL, _HALF_SPACING = np.float32(2.0**-14), np.float32(2.0**-25)


def _wide(values: F32, group_size: int) -> F32:
    """A value per group as one per column."""
    return np.repeat(values, group_size, axis=1)


def error_in_steps(weight: QuantizedWeight, source: Array) -> tuple[float, float]:
    """Largest and mean |dequantised - source|, in steps (sizes of scales) of the grid; rows are taken in blocks.

    Scales below float16's normal numbers cannot be stored nearer than 2^-25, and the error of a code is that times its
    distance from the zero-point: many steps of a grid that is next to nothing. So much is taken off the difference.
    """
    largest = total = 0.0
    for start in range(0, weight.shape[0], _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        part = replace(
            weight, codes=weight.codes[rows], scales=weight.scales[rows], zero_points=weight.zero_points[rows]
        )
        distance = np.abs(dequantize(part) - source[rows].astype(np.float32))
        # NNCF's symmetric modes have negative scales.
        sizes = np.abs(part.scales.astype(np.float32))
        if part.scales.dtype == np.float16 and bool((sizes < _LEAST_NORMAL).any()):
            levels = np.abs(part.codes.astype(np.float32) - _wide(part.zero_points.astype(np.float32), part.group_size))
            stored = np.where(sizes < _LEAST_NORMAL, _HALF_SPACING, np.float32(0))
            distance = np.maximum(distance - levels * _wide(stored, part.group_size), 0)
        steps = distance / _wide(sizes, part.group_size)
        largest = max(largest, float(steps.max()))
        total += float(steps.sum())
    return largest, total / weight.codes.size


def choose_qparams_minmax(
    values: F32, group_size: int, symmetric: bool, scale_dtype: type = np.float16, bits: int = 4
) -> tuple[Array, U8]:
    """Choose scales and zero-points from each group's minimum and maximum, as GPTQ's quantiser does.

    Asymmetric: the range is widened to hold 0, scale = (max - min) / (2^b - 1), zero_point = round(-min / scale).
    Symmetric: scale = 2 max|w| / (2^b - 1), zero_point = 2^(b-1); the largest positive value is clipped.
    The zero-point is computed from the scale as stored, so that a 0 always lands on it exactly.

    Args:
        values: float32 [out, in].
        group_size: columns per group; must divide `in`.
        symmetric: see above.
        scale_dtype: dtype in which the scales are kept.
        bits: width of a code.

    Returns:
        scales [out, groups] and zero_points uint8 [out, groups]. A group of zeros gets scale 1.
    """
    out, cols = values.shape
    grouped = values.reshape(out, cols // group_size, group_size)
    top = 2**bits - 1
    low = np.minimum(grouped.min(axis=2), 0.0)
    high = np.maximum(grouped.max(axis=2), 0.0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    empty = high == low
    scales: Array = np.where(empty, 1.0, (high - low) / top).astype(scale_dtype)
    # A range too small for the dtype would give scale 0: keep the smallest normal number instead.
    scales = np.maximum(scales, np.finfo(scale_dtype).tiny).astype(scale_dtype)
    if symmetric:
        return scales, np.full(scales.shape, 2 ** (bits - 1), np.uint8)
    zero_points = np.clip(np.rint(-low / scales.astype(np.float32)), 0, top)
    zero_points[empty] = 2 ** (bits - 1)
    return scales, zero_points.astype(np.uint8)
