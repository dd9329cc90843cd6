"""`fq_lora` against numbers worked out by hand, its promise about zeros, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sparseport.errors import BadInput, Unsupported
from sparseport.merge.fq_lora import merge_fq_lora
from sparseport.weights.fake_quantizer import FakeQuantizer
from sparseport.weights.linear import DenseWeight
from sparseport.weights.mask import mask_of, revived
from sparseport.weights.rounding import dequantize

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BF16, np.dtype(np.float16)]


def f32(*rows):
    return np.array(rows, np.float32)


def none(rows, columns):
    """An adapter that changes nothing."""
    return {"a": np.zeros((1, columns), BF16), "b": np.zeros((rows, 1), BF16)}


def asym(low, width, bits=4, group=-1, **adapter):
    return FakeQuantizer(bits, False, group, input_low=f32(*low), input_range=f32(*width), **adapter)


def sym(*scale, bits=4, group=-1, **adapter):
    return FakeQuantizer(bits, True, group, scale=f32(*scale), **adapter)


def merged(values, quantizer, rank=None):
    return merge_fq_lora(DenseWeight(values), quantizer, rank, "layer")


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_asymmetric_by_hand():
    """Range -1 .. 2.75 in 15 steps of 0.25; zero is the fourth. Ties go to an even distance from zero."""
    values = f32([-1.25, -1, -0.125, 0, 0.125, 0.25, 0.375, 2.75, 3])
    weight = merged(values, asym([[-1]], [[3.75]], **none(1, 9)))
    assert weight.codes.tolist() == [[0, 0, 4, 4, 4, 5, 6, 15, 15]]
    assert weight.zero_points.tolist() == [[4]] and weight.scales.tolist() == [[0.25]]
    assert weight.scales.dtype == np.float16 and (weight.bits, weight.group_size) == (4, 9)


def test_the_sign_of_a_range_has_no_meaning():
    for width in (3.75, -3.75):
        weight = merged(f32([-1, 0, 1, 2.75]), asym([[-1]], [[width]], **none(1, 4)))
        assert weight.codes.tolist() == [[0, 4, 8, 15]] and weight.scales.tolist() == [[0.25]]


@pytest.mark.parametrize(
    ("low", "width", "step", "zero"),
    [
        (-1.0, 3.9, Fraction(29, 110), 4),  # zero would be step 3.85: the lower end moves to -4/11 * 2.9
        (-1.1, 3.85, Fraction(11, 40), 4),  # zero would be step 4.29: the upper end moves to 11/4 * 1.1
        (0.5, 1.0, Fraction(1, 10), 0),  # starts above zero: becomes 0 .. 1.5
        (-2.0, 0.5, Fraction(2, 15), 15),  # ends below zero: becomes -2 .. 0
    ],
)
def test_the_range_moves_so_that_zero_is_a_step(low, width, step, zero):
    values = f32([float(step * k) for k in range(-zero, 16 - zero)])
    weight = merged(values, asym([[low]], [[width]], **none(1, 16)))
    assert weight.zero_points.tolist() == [[zero]]
    assert weight.scales.tolist() == [[float(np.float16(float(step)))]]
    assert weight.codes.tolist() == [list(range(16))]


def test_symmetric_by_hand():
    """Scale 2 is 8 steps of 0.25; only -2 has a code, +2 is clipped."""
    values = f32([-2.5, -2, -0.375, -0.125, 0, 0.125, 0.375, 1.75, 2])
    weight = merged(values, sym([2], **none(1, 9)))
    assert weight.codes.tolist() == [[0, 0, 6, 8, 8, 8, 10, 15, 15]]
    assert weight.zero_points.tolist() == [[8]] and weight.scales.tolist() == [[0.25]]


def test_negative_scale_by_hand():
    """Scale -2: +2 has a code, -2 is clipped, and the scale keeps its sign."""
    values = f32([2.5, 2, 1.75, 0.125, 0, -0.375, -1.75, -2] + [1.75, 1.5, 0.25, 0.125, 0, -0.375, -1.75, -2])
    weight = merged(values, sym([-2, -2], group=8, **none(1, 16)))
    assert weight.codes.tolist() == [[0, 0, 1, 8, 8, 10, 15, 15] + [1, 2, 7, 8, 8, 10, 15, 15]]
    assert weight.zero_points.tolist() == [[8, 8]] and weight.scales.tolist() == [[-0.25, -0.25]]
    assert dequantize(weight).tolist() == [
        [2, 2, 1.75, 0, 0, -0.5, -1.75, -1.75] + [1.75, 1.5, 0.25, 0, 0, -0.5, -1.75, -1.75]
    ]


def test_the_adapter_is_added_without_scaling_and_sliced_by_rank():
    adapter = {"a": np.array([[1, 2, -1, 0], [0, 1, 1, 2]], BF16), "b": np.array([[0.25, 0.5]], BF16)}
    quantizer = asym([[-1]], [[3.75]], **adapter)
    base = f32([0, 0, 0, 0])
    assert merged(base, quantizer).codes.tolist() == [[5, 8, 5, 8]]
    assert merged(base, quantizer, 2).codes.tolist() == [[5, 8, 5, 8]]
    assert merged(base, quantizer, 1).codes.tolist() == [[5, 6, 3, 4]]


def test_eight_bits_by_row():
    """Steps of 1/64 from -1, and of 1/32 from 0; a symmetric row has scale 1 and counts 128 steps of 1/128."""
    weight = merged(f32([-1, 0, 0.5, 2], [0, 1, 2, 5]), asym([[-1], [0]], [[255 / 64], [255 / 32]], bits=8))
    assert weight.codes.tolist() == [[0, 64, 96, 192], [0, 32, 64, 160]]
    assert weight.zero_points.tolist() == [[64], [0]] and weight.scales.tolist() == [[1 / 64], [1 / 32]]
    assert (weight.bits, weight.group_size) == (8, 4)
    weight = merged(f32([-1, 0, 0.5, 2]), sym([1], bits=8, **none(1, 4)))
    assert weight.codes.tolist() == [[0, 128, 192, 255]] and weight.zero_points.tolist() == [[128]]


def test_a_row_without_range_keeps_a_scale():
    """NNCF's smallest step is 2**-23, which float16 still holds."""
    weight = merged(np.zeros((2, 4), np.float32), asym([[0], [0]], [[0], [-1e-16]], bits=8))
    assert weight.codes.tolist() == [[0] * 4] * 2 and weight.scales.tolist() == [[2.0**-23]] * 2


@pytest.mark.parametrize(
    ("base", "a", "b", "tie", "codes"),
    [
        # W + B A = 1 + 3 * 2**-10, which bfloat16 rounds to 1
        (1.0, 3 * 2.0**-10, 1.0, 1 + 2.0**-10, {"float32": 9, "float16": 9, "bfloat16": 8}),
        # W + B A = 1 + 2**-12, which float16 rounds to 1 as well
        (1.0, 2.0**-12, 1.0, 1 + 2.0**-13, {"float32": 9, "float16": 8, "bfloat16": 8}),
        # B A = 1 + 2**-6 + 2**-14 loses its last bit in bfloat16, before it is added
        (0.0, 1 + 2.0**-7, 1 + 2.0**-7, 1 + 2.0**-6 + 2.0**-15, {"float32": 8}),
    ],
)
def test_product_and_sum_are_rounded_to_their_dtypes(base, a, b, tie, codes):
    """`tie` is the middle between level 0 (code 8) and level 1 (code 9)."""
    quantizer = sym([16 * tie], a=np.array([[a]], BF16), b=np.array([[b]], BF16))
    for dtype, code in codes.items():
        assert merged(np.array([[base]], np.dtype(dtype)), quantizer).codes.tolist() == [[code]], dtype
    exact = replace(quantizer, a=f32([a]), b=f32([b]))
    assert merged(f32([base]), exact).codes.tolist() == [[9]]  # the product is computed in the adapter's dtype


# --- pruned weights --------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-100, 100, width=32)


@given(
    arrays.arrays(np.float32, (3, 8), elements=NUMBERS),
    arrays.arrays(np.bool_, (3, 8)),
    arrays.arrays(np.float32, (2, 3, 2), elements=NUMBERS),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_without_an_update_pruned_weights_stay_zero(values, mask, ranges, symmetric, dtype):
    base = DenseWeight(np.where(mask, values, np.float32(0)).astype(dtype), mask)
    low, width = ranges
    quantizer = FakeQuantizer(
        4, symmetric, 4, **({"scale": low} if symmetric else {"input_low": low, "input_range": width})
    )
    result = merge_fq_lora(base, replace(quantizer, **none(3, 8)), None, "layer")
    assert revived(result, mask) == 0 and result.mask is mask
    points = np.repeat(result.zero_points, 4, axis=1)
    assert (result.codes[~mask] == points[~mask]).all()


def test_pruned_weights_that_the_adapter_moves_are_counted():
    base = f32([0, 0, 0, 1, 0, 0.5])
    adapter = {"a": np.array([[1, 0.5, 0, 1, -1, 0.25]], BF16), "b": np.array([[0.25]], BF16)}
    result = merge_fq_lora(DenseWeight(base, mask_of(base)), asym([[-1]], [[3.75]], **adapter), None, "layer")
    assert result.codes.tolist() == [[5, 4, 4, 9, 3, 6]]  # 0.125 is a tie, and stays zero
    assert revived(result, mask_of(base)) == 2
    assert merge_fq_lora(DenseWeight(base), asym([[-1]], [[3.75]], **adapter), None, "layer").mask is None


# --- refusals --------------------------------------------------------------------------------------------------------


def layer(**changes):
    good = asym(-np.ones((4, 2)), 3 * np.ones((4, 2)), group=4, a=np.ones((3, 8), BF16), b=np.ones((4, 3), BF16))
    return replace(good, **changes)


BASE, FULL = np.zeros((4, 8), np.float32), np.full((4, 8), 65504, np.float16)
NAN = f32(*[[0, np.nan]] * 4)
REFUSED = {
    "rank above": (BASE, layer(), 4, BadInput, "E_ELASTIC", r"expected 1\.\.3, found 4"),
    "rank 0": (BASE, layer(), 0, BadInput, "E_ELASTIC", "found 0"),
    "rank without adapter": (BASE, layer(a=None, b=None), 1, BadInput, "E_ELASTIC", "no adapter"),
    "more columns": (np.zeros((4, 16), np.float32), layer(), None, BadInput, "E_PAIRING", "does not fit its base"),
    "more rows": (np.zeros((5, 8), np.float32), layer(), None, BadInput, "E_PAIRING", "does not fit its base"),
    "other groups": (BASE, layer(group_size=2), None, BadInput, "E_PAIRING", "does not fit its base"),
    "adapter of other columns": (BASE, layer(a=np.ones((3, 4), BF16)), None, BadInput, "E_PAIRING", "4 x 4"),
    "half an adapter": (BASE, layer(b=None), None, BadInput, "E_NNCF", "incomplete"),
    "no range": (BASE, layer(input_range=None), None, BadInput, "E_NNCF", "incomplete"),
    "ranges differ": (BASE, layer(input_range=np.ones((4, 1), np.float32)), None, BadInput, "E_NNCF", "wrong shape"),
    "range in float64": (BASE, layer(input_range=np.ones((4, 2))), None, BadInput, "E_NNCF", "float64"),
    "adapter ranks differ": (BASE, layer(b=np.ones((4, 2), BF16)), None, BadInput, "E_NNCF", "adapter"),
    "adapter of other rows": (BASE, layer(b=np.ones((5, 3), BF16)), None, BadInput, "E_NNCF", "adapter"),
    "adapter dtypes differ": (BASE, layer(b=np.ones((4, 3), np.float32)), None, BadInput, "E_NNCF", "adapter"),
    "NaN in a range": (BASE, layer(input_low=NAN), None, BadInput, "E_FINITE", "input_low .0, 1."),
    "infinity in B": (BASE, layer(b=np.full((4, 3), np.inf, BF16)), None, BadInput, "E_FINITE", "lora_B"),
    "NaN in the base": (np.full((4, 8), np.nan, np.float32), layer(), None, BadInput, "E_NAN", "NaN"),
    "3 bits": (BASE, layer(bits=3), None, Unsupported, "E_BITS", "expected 4 or 8, found 3"),
    "float64 base": (np.zeros((4, 8)), layer(), None, Unsupported, "E_DTYPE", "float64"),
    "sum overflows": (FULL, layer(a=np.full((3, 8), 1e3, BF16)), None, BadInput, "E_OVERFLOW", "float16"),
    "step overflows": (BASE, layer(input_range=np.full((4, 2), 1e6, np.float32)), None, BadInput, "E_SCALE", "finite"),
    "range too small for float16": (FULL[:1], asym([[0]], [[0]], bits=8), None, BadInput, "E_OVERFLOW", "as float32"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "quantizer", "rank", "kind", "code", "text"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(values, quantizer, rank, kind, code, text):
    with pytest.raises(kind, match=text) as caught:
        merge_fq_lora(DenseWeight(values), quantizer, rank, "layers.0.up_proj")
    assert caught.value.code == code and "layers.0.up_proj" in str(caught.value)
