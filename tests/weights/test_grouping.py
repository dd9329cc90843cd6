"""Splitting groups is lossless, joining them is checked, and OpenVINO never gets a group size it computes wrongly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.errors import FidelityError, Unsupported
from sparseport.weights.grouping import (
    all_zero_points_are,
    collapse,
    fill_groups,
    regroup,
    without_filling,
)
from sparseport.weights.linear import QuantizedWeight
from sparseport.weights.rounding import dequantize


def random_weight(seed, out, groups, size):
    random = np.random.default_rng(seed)
    return QuantizedWeight(
        random.integers(0, 16, (out, groups * size), np.uint8),
        random.uniform(0.01, 1, (out, groups)).astype(np.float16),
        random.integers(0, 16, (out, groups), np.uint8),
        size,
    )


def same(left, right):
    return left.group_size == right.group_size and all(
        np.array_equal(getattr(left, name), getattr(right, name)) for name in ("codes", "scales", "zero_points")
    )


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_split_groups_are_the_same_weight_and_join_again(seed, out, groups, times, small):
    weight = random_weight(seed, out, groups, times * small)
    split = regroup(weight, small)
    assert split.group_size == small and split.groups == groups * times
    assert np.array_equal(dequantize(split), dequantize(weight))
    assert np.array_equal(split.codes, weight.codes)
    assert same(collapse(split.check("w"), weight.group_size, "w"), weight)


@pytest.mark.parametrize("part", ["scales", "zero_points"])
@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("group", range(6))
def test_groups_that_differ_do_not_join(part, row, group):
    split = regroup(random_weight(0, 3, 2, 96), 32)
    array = getattr(split, part).copy()
    array[row, group] = (array[row, group] + 1) % 16 if part == "zero_points" else np.nextafter(array[row, group], 9)
    with pytest.raises(FidelityError, match="no longer agree"):
        collapse(replace(split, **{part: array}), 96, "layer")


def test_groups_are_not_split_where_that_is_lossy():
    with pytest.raises(Unsupported, match="losslessly"):
        regroup(random_weight(0, 1, 2, 48), 32)


def test_symmetric_weights_are_recognised():
    weight = random_weight(0, 2, 2, 4)
    eights = replace(weight, zero_points=np.full((2, 2), 8, np.uint8))
    assert all_zero_points_are(eights, 8) and not all_zero_points_are(eights, 7)
    points = eights.zero_points.copy()
    points[1, 1] = 7
    assert not all_zero_points_are(replace(eights, zero_points=points), 8)


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 9), st.booleans())
def test_filled_groups_are_the_same_layer_and_come_off_again(seed, out, groups, size, more, ordered):
    weight = random_weight(seed, out, groups, size)
    random = np.random.default_rng(seed)
    if ordered:
        order = random.permutation(groups * size).astype(np.int32)
        weight = replace(weight, input_order=None if np.array_equal(order, np.arange(order.size)) else order)
    filled = fill_groups(weight, size + more).check("w")
    assert filled.group_size == size + more and filled.groups == groups
    inputs = random.normal(size=groups * size)
    columns = dequantize(replace(filled, input_order=None)).astype(np.float64)
    gathered = inputs if filled.input_order is None else inputs[filled.input_order]
    assert np.allclose(columns @ gathered, dequantize(weight).astype(np.float64) @ inputs)
    again = without_filling(filled, "w")
    assert same(again, weight)
    assert (again.input_order is None) == (weight.input_order is None)
    assert again.input_order is None or np.array_equal(again.input_order, weight.input_order)


def test_filling_is_checked():
    filled = fill_groups(random_weight(0, 3, 4, 5), 8)
    codes = filled.codes.copy()
    codes[1, 6] ^= 1
    with pytest.raises(FidelityError, match="is not zero"):
        without_filling(replace(filled, codes=codes), "layer")
    order = filled.input_order.copy()
    order[7] = order[8]  # one group now seems to have more columns of its own
    with pytest.raises(FidelityError):
        without_filling(replace(filled, input_order=order), "layer")
    with pytest.raises(Unsupported, match="fewer"):
        fill_groups(filled, 5)
