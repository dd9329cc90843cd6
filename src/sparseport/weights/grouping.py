"""Lossless changes of layout: finer groups, act-order permutations, and the symmetric special case."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparseport.errors import FidelityError, Unsupported
from sparseport.weights.linear import QuantizedWeight


def regroup(weight: QuantizedWeight, group_size: int) -> QuantizedWeight:
    """The same weight with smaller groups: scales and zero-points are repeated, codes do not change.

    Raises:
        Unsupported: `group_size` does not divide the present one.
    """
    if group_size == weight.group_size:
        return weight
    if weight.group_size % group_size:
        raise Unsupported(
            "groups can only be split losslessly", expected=f"a divisor of {weight.group_size}", found=group_size
        )
    times = weight.group_size // group_size
    return replace(
        weight,
        scales=np.repeat(weight.scales, times, axis=1),
        zero_points=np.repeat(weight.zero_points, times, axis=1),
        group_size=group_size,
    )


def collapse(weight: QuantizedWeight, group_size: int, where: str) -> QuantizedWeight:
    """Inverse of `regroup`, used on read-back: refuses unless the groups that it joins are truly equal.

    Raises:
        FidelityError: two groups that came from one differ.
    """
    if group_size == weight.group_size:
        return weight
    times = group_size // weight.group_size
    out = weight.shape[0]
    scales = weight.scales.reshape(out, -1, times)
    zero_points = weight.zero_points.reshape(out, -1, times)
    if not ((scales == scales[:, :, :1]).all() and (zero_points == zero_points[:, :, :1]).all()):
        raise FidelityError("groups that were split from one no longer agree", where=where)
    return replace(
        weight,
        scales=np.ascontiguousarray(scales[:, :, 0]),
        zero_points=np.ascontiguousarray(zero_points[:, :, 0]),
        group_size=group_size,
    )


def fill_groups(weight: QuantizedWeight, group_size: int) -> QuantizedWeight:
    """The same linear layer with more columns per group: each group is filled up with columns of zeros.

    A filling column has code == zero_point, so it is exactly zero, and it reads the input of its group's first column
    (`input_order` then names that input more than once).

    Raises:
        Unsupported: `group_size` is smaller than the present one.
    """
    out, cols = weight.shape
    more = group_size - weight.group_size
    if more < 0:
        raise Unsupported("groups cannot be filled to fewer columns", expected=weight.group_size, found=group_size)
    if more == 0:
        return weight
    order = np.arange(cols, dtype=np.int32) if weight.input_order is None else weight.input_order
    inputs = order.reshape(weight.groups, weight.group_size)
    inputs = np.concatenate([inputs, np.repeat(inputs[:, :1], more, axis=1)], axis=1)
    codes = weight.codes.reshape(out, weight.groups, weight.group_size)
    codes = np.concatenate([codes, np.repeat(weight.zero_points[:, :, None], more, axis=2)], axis=2)
    return replace(
        weight,
        codes=codes.reshape(out, -1),
        group_size=group_size,
        input_order=np.ascontiguousarray(inputs.reshape(-1)).astype(np.int32),
        mask=None,
    )


def without_filling(weight: QuantizedWeight, where: str) -> QuantizedWeight:
    """Inverse of `fill_groups`, used on read-back: columns that read an input for the second time must be zeros.

    Raises:
        FidelityError: such a column holds a weight, or groups have different numbers of them.
    """
    order = weight.input_order
    if order is None:
        return weight
    _, first = np.unique(order, return_index=True)
    if first.size == order.size:
        return weight
    real = np.zeros(order.size, np.bool_)
    real[first] = True
    zeros = np.repeat(weight.zero_points, weight.group_size, axis=1)
    if (weight.codes[:, ~real] != zeros[:, ~real]).any():
        raise FidelityError("a column that fills up a group is not zero", where=where, code="E_READBACK")
    per_group = real.reshape(weight.groups, weight.group_size).sum(axis=1)
    if (per_group != per_group[0]).any():
        raise FidelityError("groups are filled up by different numbers of columns", where=where, code="E_READBACK")
    kept = order[real]
    return replace(
        weight,
        codes=np.ascontiguousarray(weight.codes[:, real]),
        group_size=int(per_group[0]),
        input_order=None if np.array_equal(kept, np.arange(kept.size)) else kept,
    )


def all_zero_points_are(weight: QuantizedWeight, value: int) -> bool:
    """Whether every zero-point equals `value` (8: the weight is symmetric, and i4 without zero-points holds it)."""
    return bool((weight.zero_points == value).all())
