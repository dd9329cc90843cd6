"""Merging NNCF's fake quantisers: rule `fq_lora`. The codes that nncf.strip(model, strip_format=DQ) gives.

NNCF 3.4 computes a layer's weight in two steps, which are repeated here operation by operation.

1. Fake quantisation (quantize_functions.py). W' = W + B A, rounded to W's dtype, then in float32, with
   s = (2^bits - 1) / width,

       q = round((clip(W', low, low + width) - low) * s - round(-low * s)) / s

   and q is rounded to W's dtype. The range (low, width) is the trained one, moved so that 0 is a grid point.
2. strip (strip.py) measures the step of the range again, in float32, and rounds q to codes of that step. The step is
   stored as float16. For symmetric quantisers without an adapter it is not the step of the first part; also repeated.

Where the same formula can be computed in two ways, it matters which:

- B A is computed by torch in the adapter's dtype (bfloat16), from float32 sums in an order that depends on the machine.
  Here it is the correctly rounded product. Measured on x86-64 with AVX2 and torch 2.13: no difference in layers of 64
  and 128 features; at 576 x 1536, 2 to 19 of a million elements with ranks 16 to 32 and 70 with rank 256, by a unit in
  the last of bfloat16's 8 bits (by a few where the sum nearly cancels). That changes a code where W' lies as near to a
  rounding edge: 0 of 884,736 codes of that layer, 1 of 4.2 million at 2048 x 2048.
- s is computed as (1 / width) * (2^bits - 1) for quantisers with an adapter: that is what torch makes of Python's
  `number / tensor`. Quantisers without one (embedding and head in INT8) run in NNCF's C++ extension, which divides once
  and computes in W's dtype. Where NNCF finds no C++ compiler it takes another way for these: then 2 of a million codes
  differ with a float32 base, and 2 to 40 of a hundred with a base of 16 bits.

The base's dtype is part of the formula. NNCF's examples train on bfloat16 and export from float32: convert the base's
values to float32 to get what they export.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparseport.errors import BadInput, Unsupported
from sparseport.merge.delta import low_rank_product, row_blocks
from sparseport.weights.fake_quantizer import FakeQuantizer
from sparseport.weights.linear import F32, U8, Array, DenseWeight, LowRankBranch, QuantizedWeight

_Floats = npt.NDArray[Any]

# What NNCF adds to a range, so that no range is zero (BaseQuantizer.eps).
_RANGE_EPS = np.float32(1e-16)
# Steps below this are replaced by it (strip.py); in float16 it is a subnormal number, but not zero.
_STEP_EPS = np.finfo(np.float32).eps


@dataclass(frozen=True)
class _Grid:
    """The grid of a layer; arrays are float32 [out, groups].

    low, width   range of fake quantisation
    step         distance of codes in strip; may be negative if symmetric
    zero         level of zero
    bottom, top  lowest and highest level
    """

    low: F32
    width: F32
    step: F32
    zero: F32
    bottom: int
    top: int


def merge_fq_lora(base: DenseWeight, quantizer: FakeQuantizer, rank: int | None, where: str) -> QuantizedWeight:
    """Quantise W + B[:, :rank] A[:rank] on the trained grid, as nncf.strip does.

    A symmetric grid becomes unsigned: level q is code q + 2**(bits - 1) with the zero-point in the middle. Its scale
    may be negative, as NNCF chooses it where a group's largest weight is positive, and is carried with its sign.

    NNCF knows no mask: the adapter moves every weight, pruned ones too.

    Args:
        base: [out, in], float16, bfloat16 or float32; the dtype decides how W' is rounded (see the module).
        quantizer: trained range and adapter.
        rank: active rank of a sub-adapter (NLS); None = the trained rank.
        where: module name, for messages.

    Returns:
        Codes, float16 scales and zero-points as nncf.strip gives them, with the base's mask.

    Raises:
        BadInput: shapes disagree, the rank was not trained, NaN / Inf, or a number overflows.
        Unsupported: other than 4 or 8 bits, or a base of another dtype.
    """
    quantizer.check(where)
    branch = _branch(quantizer, rank, where)
    groups = next(iter(quantizer.ranges.values())).shape[1]
    _check_fit(base, quantizer, branch, groups, where)
    rows, columns = base.shape
    grid = _symmetric_grid(quantizer, base.values.dtype) if quantizer.symmetric else _asymmetric_grid(quantizer)
    delta = None if branch is None else _product(branch, where)
    codes = np.empty((rows, groups, columns // groups), np.uint8)
    zero_points = np.empty((rows, groups), np.uint8)
    for block in row_blocks(base.shape):
        merged = _sum(base.values[block], None if delta is None else delta[block], where)
        grouped = merged.reshape(merged.shape[0], groups, -1)
        low, width = grid.low[block, :, None], grid.width[block, :, None]
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # refused below
            if delta is None:
                dtype = merged.dtype
                rounded = _fake_quantize(grouped, low.astype(dtype), width.astype(dtype), grid, reciprocal=False)
            else:
                rounded = _fake_quantize(grouped.astype(np.float32), low, width, grid, reciprocal=True)
                rounded = rounded.astype(merged.dtype)
        wide = rounded.astype(np.float32)
        if not np.isfinite(wide).all():
            raise BadInput(
                f"the range of a fake quantiser cannot be computed in {merged.dtype}",
                where=where,
                fix="take the base as float32 (--nncf-base-dtype float32)",
                code="E_OVERFLOW",
            )
        levels = np.rint(wide / grid.step[block, :, None] + grid.zero[block, :, None])
        np.clip(levels, grid.bottom, grid.top, out=levels)
        codes[block], zero_points[block] = _unsigned(levels, grid, block)
    with np.errstate(over="ignore"):  # an infinite scale is refused by check
        scales = grid.step.astype(np.float16)
    return QuantizedWeight(
        codes.reshape(rows, columns), scales, zero_points, columns // groups, quantizer.bits, base.mask
    ).check(where, signed_scales=True)


def _branch(quantizer: FakeQuantizer, rank: int | None, where: str) -> LowRankBranch | None:
    if rank is not None and not 1 <= rank <= quantizer.rank:
        raise BadInput(
            "rank was not trained",
            where=where,
            expected=f"1..{quantizer.rank}" if quantizer.rank else "no rank: the quantiser has no adapter",
            found=rank,
            code="E_ELASTIC",
        )
    if quantizer.a is None or quantizer.b is None:
        return None
    return LowRankBranch(quantizer.a, quantizer.b, 1.0).at_rank(rank or quantizer.rank)


def _check_fit(
    base: DenseWeight, quantizer: FakeQuantizer, branch: LowRankBranch | None, groups: int, where: str
) -> None:
    if base.values.dtype.name not in ("float16", "bfloat16", "float32"):
        raise Unsupported(
            "base weight has an unsupported dtype",
            where=where,
            expected="float16, bfloat16 or float32",
            found=base.values.dtype,
            code="E_DTYPE",
        )
    rows, columns = base.shape
    size = columns if quantizer.group_size == -1 else quantizer.group_size
    fits = quantizer.rows == rows and size * groups == columns
    if not fits or (branch is not None and branch.a.shape[1] != columns):
        inputs = "any" if branch is None else branch.a.shape[1]
        raise BadInput(
            "fake quantiser does not fit its base",
            where=where,
            expected=f"{rows} x {columns}",
            found=f"{quantizer.rows} x {inputs}, {groups} groups of {quantizer.group_size}",
            fix="use the base model that was compressed and tuned",
            code="E_PAIRING",
        )


def _asymmetric_grid(quantizer: FakeQuantizer) -> _Grid:
    assert quantizer.input_low is not None and quantizer.input_range is not None
    top = 2**quantizer.bits - 1
    low, width = _tune_range(quantizer.input_low, np.abs(quantizer.input_range) + _RANGE_EPS, top)
    step = _safe_step(width / np.float32(top))
    return _Grid(low, width, step, np.clip(-np.rint(low / step), 0, top), 0, top)


def _symmetric_grid(quantizer: FakeQuantizer, dtype: np.dtype[Any]) -> _Grid:
    assert quantizer.scale is not None
    half = 2 ** (quantizer.bits - 1)
    scale = quantizer.scale
    if quantizer.a is not None:
        safe = np.where(np.abs(scale) < _RANGE_EPS, _RANGE_EPS, scale)
        low = np.where(safe > 0, -safe, safe / np.float32(half) * np.float32(half - 1))
        width = np.abs(np.float32(2 - 1 / half) * safe)
    else:
        # Without an adapter the range is made in the weight's dtype, and always runs from low to high.
        safe = _in(np.abs(scale) + _RANGE_EPS, dtype)
        low = _in(safe * np.float32(-half / (half - 1)), dtype)
        width = _in(safe - low, dtype)
    return _Grid(low, width, _safe_step(scale / np.float32(half)), np.zeros_like(scale), -half, half - 1)


def _in(values: F32, dtype: np.dtype[Any]) -> F32:
    """float32 numbers after rounding to a dtype."""
    with np.errstate(over="ignore"):
        return values.astype(dtype).astype(np.float32)


def _safe_step(step: F32) -> F32:
    return np.where(np.abs(step) < _STEP_EPS, _STEP_EPS, step)


def _tune_range(low: F32, width: F32, top: int) -> tuple[F32, F32]:
    """The range moved so that 0 is a grid point (NNCF, TuneRange), float32: one end moves, the lower or the upper,
    whichever gives the wider range."""
    one, steps = np.float32(1), np.float32(top)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # in the branch that is not taken
        high = np.maximum(width + low, np.float32(0))
        low = np.minimum(low, np.float32(0))
        zero = np.rint(-low * (one / (high - low) * steps))
        lower = np.where(zero < steps, zero / (zero - steps) * high, low)
        higher = np.where(zero > 0, (zero - steps) / zero * low, high)
        move_low = high - lower > higher - low
        tuned = np.where(move_low, lower, low)
        return tuned, np.where(move_low, high, higher) - tuned


def _fake_quantize(values: _Floats, low: _Floats, width: _Floats, grid: _Grid, *, reciprocal: bool) -> _Floats:
    """Values rounded to the grid, in their own dtype: each operation is rounded to it, as torch does."""
    number = values.dtype.type
    top = number(grid.top - grid.bottom)
    per_unit = number(1) / width * top if reciprocal else top / width
    rounded: _Floats = np.minimum(np.maximum(values, low), low + width)
    rounded -= low
    rounded *= per_unit
    rounded -= np.rint(-low * per_unit)
    np.rint(rounded, out=rounded)
    rounded /= per_unit
    return rounded


def _product(branch: LowRankBranch, where: str) -> F32:
    """b @ a, rounded to the adapter's dtype, as float32 [out, in]."""
    return _in(low_rank_product(branch, where), branch.a.dtype)


def _sum(values: Array, delta: F32 | None, where: str) -> Array:
    wide = values.astype(np.float32)
    if not np.isfinite(wide).all():
        raise BadInput("base weight holds NaN or Inf", where=where, code="E_NAN")
    if delta is None:
        return values
    with np.errstate(over="ignore"):
        merged: Array = (wide + delta).astype(values.dtype)
    if not np.isfinite(merged.astype(np.float32)).all():
        raise BadInput(
            f"merged weight overflows {values.dtype}",
            where=where,
            fix="take the base as float32 (--nncf-base-dtype float32)",
            code="E_OVERFLOW",
        )
    return merged


def _unsigned(levels: F32, grid: _Grid, block: slice) -> tuple[U8, U8]:
    """Codes and zero-points of levels [rows, groups, columns per group]; see `merge_fq_lora`."""
    if grid.bottom == 0:
        return levels.astype(np.uint8), grid.zero[block].astype(np.uint8)
    middle = np.full(grid.step[block].shape, -grid.bottom, np.uint8)
    return (levels - np.float32(grid.bottom)).astype(np.uint8), middle
