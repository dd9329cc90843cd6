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


def openvino_group_size(group_size: int, in_features: int, where: str) -> int:
    """The group size to use on OpenVINO's CPU plugin, which computes wrong results for many others without an error.

    Safe are 8, 16, 32, multiples of 64, and one group per row. Others are split to their largest power of two.

    Raises:
        Unsupported: no safe lossless split exists (odd groups, for example).
    """
    if group_size == in_features or group_size in (8, 16, 32) or group_size % 64 == 0:
        return group_size
    power = group_size & -group_size  # the largest power of two that divides it
    power = min(power, 64)
    if power >= 8:
        return power
    raise Unsupported(
        "OpenVINO computes this group size wrongly and it cannot be split losslessly",
        where=where,
        expected="a group size with a divisor of 8, 16, 32 or 64",
        found=group_size,
        fix="quantise with group size 32, 64 or 128",
        code="E_GROUP",
    )


def all_zero_points_are(weight: QuantizedWeight, value: int) -> bool:
    """Whether every zero-point equals `value` (8: the weight is symmetric, and i4 without zero-points holds it)."""
    return bool((weight.zero_points == value).all())
