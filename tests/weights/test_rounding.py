"""Rounding rules: exhaustive where the space is small, against scalar arithmetic where it is not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparseport.errors import BadInput
from sparseport.weights.linear import QuantizedWeight
from sparseport.weights.rounding import RoundingRule, choose_qparams_minmax, dequantize, quantize_to_grid

SQFT, PAPER = RoundingRule.SQFT, RoundingRule.PAPER
ALL_SCALES = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)  # every positive finite float16


def one(value, scale, point, rule, dtype=np.float16):
    """The code of a single weight."""
    codes = quantize_to_grid(
        np.array([[value]], np.float32), np.array([[scale]], dtype), np.array([[point]], np.uint8), 1, rule
    )
    return int(codes[0, 0])


def by_hand(value, scale, point, rule):
    """The rule in scalar arithmetic; Python's round is half to even."""
    if rule is SQFT:
        offset = np.float32(np.float16(point) * scale)
        real = float(np.float32(np.float32(value) + offset) / np.float32(scale))
        code = round(real)
    else:
        code = round(float(np.float32(value) / np.float32(scale))) + point
    return min(max(code, 0), 15)


@pytest.fixture(scope="module")
def pairs():
    """All float16 scales with all zero-points, [n, 1] each, and whether z*s stays finite in float16."""
    scales = np.repeat(ALL_SCALES, 16)[:, None]
    points = np.tile(np.arange(16, dtype=np.uint8), len(ALL_SCALES))[:, None]
    exact = scales.astype(np.float64) * points
    return scales, points, exact[:, 0] < 65520  # 65520 is where float16 rounds up to infinity


@pytest.mark.parametrize("rule", list(RoundingRule))
def test_a_pruned_weight_lands_on_its_zero_point_for_every_scale(pairs, rule):
    scales, points, fits = pairs
    keep = fits if rule is SQFT else np.ones_like(fits)
    zeros = np.zeros((int(keep.sum()), 1), np.float32)
    assert np.array_equal(quantize_to_grid(zeros, scales[keep], points[keep], 1, rule), points[keep])


def test_zero_point_times_scale_that_overflows_is_refused(pairs):
    scales, points, fits = pairs
    for point in range(1, 16):
        bad = ~fits & (points[:, 0] == point)
        if not bad.any():
            assert point == 1
            continue
        smallest = scales[bad].min()
        with pytest.raises(BadInput, match=r"overflows.*float16") as caught:
            one(0.0, smallest, point, SQFT)
        assert caught.value.code == "E_SCALE"
        below = np.nextafter(smallest, np.float16(0))
        assert one(0.0, below, point, SQFT) == point
        assert one(0.0, smallest, point, PAPER) == point


@pytest.mark.parametrize("rule", list(RoundingRule))
def test_every_grid_value_gets_its_own_code_back(pairs, rule):
    scales, points, fits = pairs
    part = slice(None, None, 7)  # co-prime to 16, so that every zero-point meets thousands of scales
    scales, points = scales[fits][part], points[fits][part]
    assert len(np.unique(points)) == 16
    codes = np.tile(np.arange(16, dtype=np.uint8), (len(scales), 1))
    values = dequantize(QuantizedWeight(codes, scales, points, 16))
    assert np.array_equal(quantize_to_grid(values, scales, points, 16, rule), codes)


def test_dequantize_is_exact_for_every_pair_and_scale_dtype():
    codes, points = np.meshgrid(np.arange(16, dtype=np.uint8), np.arange(16, dtype=np.uint8))
    points = points[:, :1]
    for scale in (np.float16(0.1), np.float16(6e-8), np.float16(4000), np.float32(0.1)):
        weight = QuantizedWeight(codes, np.full((16, 1), scale), points, 16)
        expected = [[np.float32(float(scale) * (c - z)) for c in range(16)] for z in range(16)]
        assert dequantize(weight).dtype == np.float32
        assert np.array_equal(dequantize(weight), np.array(expected, np.float32))


def test_dequantize_puts_act_order_columns_back():
    weight = QuantizedWeight(
        np.array([[1, 2, 3, 4]], np.uint8),
        np.array([[1.0, 10.0]], np.float16),
        np.zeros((1, 2), np.uint8),
        2,
        input_order=np.array([2, 0, 3, 1], np.int32),
    )
    # Stored column j is input order[j].
    assert dequantize(weight).tolist() == [[2.0, 40.0, 1.0, 30.0]]


@pytest.mark.parametrize("rule", list(RoundingRule))
def test_ties_go_to_even(rule):
    codes = [one(value, 1.0, 0, rule) for value in (0.5, 1.5, 2.5, 3.5, 4.5)]
    assert codes == [0, 2, 2, 4, 4]


@pytest.mark.parametrize("rule", list(RoundingRule))
def test_codes_stop_at_both_ends(rule):
    assert [one(value, 1.0, 8, rule) for value in (-1e6, -8.6, -8, 7, 7.6, 1e6)] == [0, 0, 0, 15, 15, 15]


def test_the_rules_differ_on_ties_of_odd_zero_points_and_nowhere_else():
    # Scales are powers of two here, so that z*s is exact and only ties can differ.
    eighths = np.arange(-40, 41) / 8
    for point in range(16):
        for exponent in (-14, -3, 0, 4):
            scale = 2.0**exponent
            for value in eighths:
                sqft, paper = (one(value * scale, scale, point, rule) for rule in (SQFT, PAPER))
                inside = -point < value < 15 - point
                differ = point % 2 == 1 and value % 1 == 0.5 and inside
                assert (sqft != paper) == differ, (point, scale, value)
    assert (one(0.5, 1.0, 1, SQFT), one(0.5, 1.0, 1, PAPER)) == (2, 1)


def test_the_rules_differ_where_zero_point_times_scale_is_rounded():
    scale = np.float16(1 + 2**-10)  # 3 * scale needs one bit more than float16 has, and rounds up
    assert (one(0.5, scale, 3, SQFT), one(0.5, scale, 3, PAPER)) == (4, 3)
    # With a wider scale the product is exact, and the difference is gone.
    assert one(0.5, np.float32(scale), 3, SQFT, np.float32) == 3


@given(st.data(), st.sampled_from(RoundingRule))
def test_codes_are_those_of_scalar_arithmetic(data, rule):
    rows, groups, size = (data.draw(st.integers(1, 4)) for _ in range(3))
    scales = data.draw(arrays(np.float16, (rows, groups), elements=st.floats(2**-10, 64, width=16)))
    points = data.draw(arrays(np.uint8, (rows, groups), elements=st.integers(0, 15)))
    values = data.draw(arrays(np.float32, (rows, groups * size), elements=st.floats(-200, 200, width=32)))
    before = values.copy()
    codes = quantize_to_grid(values, scales, points, size, rule)
    assert codes.dtype == np.uint8 and np.array_equal(values, before)
    for row in range(rows):
        for column in range(groups * size):
            group = column // size
            expected = by_hand(values[row, column], scales[row, group], int(points[row, group]), rule)
            assert codes[row, column] == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", list(RoundingRule))
def test_values_that_are_not_finite_are_refused(bad, rule):
    with pytest.raises(BadInput, match="NaN or Inf") as caught:
        one(bad, 1.0, 8, rule)
    assert caught.value.code == "E_NAN"


@given(st.data(), st.booleans())
def test_a_chosen_grid_holds_zero_and_every_weight_within_half_a_step(data, symmetric):
    rows, groups, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    elements = st.one_of(st.just(0.0), st.floats(-1e4, 1e4, width=32), st.floats(-(2**-10), 2**-10, width=32))
    values = data.draw(arrays(np.float32, (rows, groups * size), elements=elements))
    scales, points = choose_qparams_minmax(values, size, symmetric)
    assert scales.dtype == np.float16 and scales.shape == points.shape == (rows, groups)
    assert (scales > 0).all() and np.isfinite(scales).all() and points.dtype == np.uint8 and points.max() <= 15
    if symmetric:
        assert (points == 8).all()
    codes = quantize_to_grid(values, scales, points, size, PAPER)
    assert codes.max(initial=0) <= 15
    wide_points = np.repeat(points, size, axis=1)
    assert np.array_equal(codes[values == 0], wide_points[values == 0])
    error = np.abs(values.astype(np.float64) - dequantize(QuantizedWeight(codes, scales, points, size)))
    # A scale rounded to float16 may be 2^-11 too small, which 15 steps add up.
    step = np.repeat(scales, size, axis=1).astype(np.float64)
    assert (error <= step * (0.5 + 15 * 2**-11 + 1e-5)).all()


def test_known_grids():
    values = np.array([[-1.0, 0.5, 2.0, 0.0], [3.0, 1.0, 2.0, 1.5]], np.float32)
    scales, points = choose_qparams_minmax(values, 4, symmetric=False)
    assert scales.tolist() == [[np.float16(0.2)], [np.float16(0.2)]] and points.tolist() == [[5], [0]]
    scales, points = choose_qparams_minmax(values, 4, symmetric=True)
    assert scales.tolist() == [[np.float16(4 / 15)], [np.float16(0.4)]] and points.tolist() == [[8], [8]]


def test_an_empty_group_gets_scale_one_and_a_tiny_one_a_normal_scale():
    values = np.array([[0.0, 0.0, 1e-7, -1e-7]], np.float32)
    scales, points = choose_qparams_minmax(values, 2, symmetric=False)
    assert scales.tolist() == [[1.0, float(np.finfo(np.float16).tiny)]]
    assert points.tolist() == [[8, 0]]
