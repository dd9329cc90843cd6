"""Masks: what counts as zero, what counts as revived, and N:M patterns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.mask import find_n_m, keeps_n_m, mask_of, pack_bitmask, revived, sparsity, unpack_bitmask


def test_only_zeros_are_pruned_and_minus_zero_is_one():
    tiny = np.float16(6e-8)
    values = np.array([[0.0, -0.0, tiny, -tiny, 1.0, np.nan]], np.float16)
    mask = mask_of(values)
    assert mask.dtype == np.bool_ and mask.tolist() == [[False, False, True, True, True, True]]
    assert sparsity(mask) == pytest.approx(2 / 6)


def test_sparsity_counts_what_is_pruned():
    assert sparsity(np.ones((2, 4), bool)) == 0.0
    assert sparsity(np.array([[True, False], [False, False]])) == 0.75


def test_dense_weights_that_came_back_are_counted():
    mask = np.array([[True, False, False], [False, True, True]])
    values = np.array([[1, 0, -0.0], [0, 0, 2]], np.float16)
    assert revived(DenseWeight(values), mask) == 0  # a kept weight may be zero
    values[0, 1] = 6e-8
    values[1, 0] = -3
    assert revived(DenseWeight(values), mask) == 2


def quantized(order=None):
    # Zero-points differ between the groups, so that a wrong column reads a wrong one.
    return QuantizedWeight(
        np.array([[3, 5, 9, 9], [0, 0, 15, 1]], np.uint8),
        np.ones((2, 2), np.float16),
        np.array([[3, 9], [0, 15]], np.uint8),
        2,
        input_order=order,
    )


def test_codes_off_their_zero_point_are_counted():
    none_kept = np.zeros((2, 4), bool)
    assert revived(quantized(), none_kept) == 2
    keep = none_kept.copy()
    keep[0, 1] = True
    assert revived(quantized(), keep) == 1
    keep[1, 3] = True
    assert revived(quantized(), keep) == 0


def test_the_mask_is_in_the_models_column_order():
    # Stored column j is input order[j]: the off-zero codes in stored columns 1 and 3 are inputs 0 and 2.
    weight = quantized(np.array([3, 0, 1, 2], np.int32))
    keep = np.zeros((2, 4), bool)
    keep[0, 0] = keep[1, 2] = True
    assert revived(weight, keep) == 0
    assert revived(weight, keep[:, ::-1]) == 2


@pytest.mark.parametrize(
    ("rows", "n", "m", "holds"),
    [
        ([[1, 0, 1, 0, 0, 0, 1, 1]], 2, 4, True),
        ([[1, 0, 1, 1, 0, 0, 0, 1]], 2, 4, False),  # 50% sparse, but the first block keeps three
        ([[0, 0, 0, 0, 0, 1, 0, 0]], 2, 4, True),  # sparser than asked
        ([[0, 1, 1, 1, 0, 0, 0, 1]], 4, 8, True),
        ([[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]], 4, 8, False),
        ([[0, 0, 0, 0, 0, 0]], 2, 4, False),  # columns that do not fill blocks
        ([[1, 0, 0, 1]], 1, 2, True),
    ],
)
def test_n_of_m_patterns(rows, n, m, holds):
    assert keeps_n_m(np.array(rows, bool), n, m) is holds


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([[1, 0, 1, 0, 0, 0, 1, 1]], (2, 4)),
        ([[1, 0, 1, 1, 0, 0, 0, 1]], (4, 8)),  # three in the first block of four, but four in the eight
        ([[1, 0, 1, 1, 0, 0, 1, 1]], None),
        ([[1, 0, 1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0, 1]], (4, 8)),  # one row is enough to lose 2:4
        ([[1, 0, 1, 0]], (2, 4)),
        ([[1, 1, 1, 1]], None),
        ([[0, 0, 0, 0, 0, 0]], None),  # six columns fill neither blocks of four nor of eight
    ],
)
def test_the_tightest_pattern_is_found(rows, pattern):
    assert find_n_m(np.array(rows, bool)) == pattern


def test_bits_of_a_mask_stand_low_column_first():
    mask = np.array([[1, 0, 0, 0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0, 0, 1, 1, 0]], bool)
    bits = pack_bitmask(mask)
    assert bits.dtype == np.uint8 and bits.tolist() == [[0x01, 0x02], [0x86, 0x01]]
    read, filling = unpack_bitmask(bits, 10)
    assert read.dtype == np.bool_ and np.array_equal(read, mask) and filling == 0


def test_bits_beyond_the_last_column_are_counted():
    mask, filling = unpack_bitmask(np.array([[0xFF], [0x1F], [0x20]], np.uint8), 5)
    assert mask.tolist() == [[True] * 5, [True] * 5, [False] * 5]
    assert filling == 4


@given(st.data())
def test_masks_come_back_from_their_bits(data):
    shape = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    mask = data.draw(arrays(np.bool_, shape))
    bits = pack_bitmask(mask)
    for row in range(shape[0]):
        for byte in range(bits.shape[1]):
            expected = sum(2**k for k, kept in enumerate(mask[row, 8 * byte : 8 * byte + 8]) if kept)
            assert bits[row, byte] == expected
    read, filling = unpack_bitmask(bits, shape[1])
    assert np.array_equal(read, mask) and filling == 0
