"""Nibble dialects against literal bytes, and there and back for every value and shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparseport.errors import BadInput
from sparseport.weights.packing import (
    AWQ_ORDER,
    ZeroPointStorage,
    pack_awq_words,
    pack_gptq_codes,
    pack_gptq_zero_points,
    pack_nibbles_low_first,
    pack_row_words,
    pack_words_low_first,
    unpack_awq_words,
    unpack_gptq_codes,
    unpack_gptq_zero_points,
    unpack_nibbles_low_first,
    unpack_row_words,
    unpack_words_low_first,
)

NIBBLES = st.integers(0, 15)


def u8(*rows):
    return np.array(rows, np.uint8)


def test_the_first_nibble_is_the_low_one():
    assert pack_nibbles_low_first(u8([1, 2], [3, 4], [15, 0], [0, 15])).tobytes() == bytes.fromhex("21430ff0")


def test_nibbles_follow_c_order_whatever_the_memory_layout():
    codes = u8([1, 2, 3], [4, 5, 6])
    assert pack_nibbles_low_first(np.asfortranarray(codes)).tobytes() == bytes.fromhex("214365")
    assert pack_nibbles_low_first(codes.T).tobytes() == bytes.fromhex("415263")


def test_an_odd_number_of_nibbles_is_refused():
    with pytest.raises(BadInput, match="odd number") as caught:
        pack_nibbles_low_first(u8([1, 2, 3]))
    assert caught.value.code == "E_PACK"


def test_gptq_words_hold_eight_inputs_of_one_output():
    # Row 0 holds codes 0..7, row 1 holds 8..15: input k stands at bits 4k.
    packed = pack_gptq_codes(u8(range(8), range(8, 16)))
    assert packed.dtype == np.int32 and packed.shape == (1, 2)
    assert packed.tobytes() == bytes.fromhex("1032547698badcfe")


def test_gptq_words_of_one_output_stand_below_each_other():
    packed = pack_gptq_codes(u8([*range(8), *range(15, 7, -1)]))
    assert packed.shape == (2, 1)
    assert [hex(int(word) & 0xFFFFFFFF) for word in packed[:, 0]] == ["0x76543210", "0x89abcdef"]


@pytest.mark.parametrize(
    ("storage", "words"), [(ZeroPointStorage.V2, "0x76543210"), (ZeroPointStorage.V1, "0x6543210f")]
)
def test_gptq_zero_points_v1_store_one_less_and_zero_as_fifteen(storage, words):
    packed = pack_gptq_zero_points(np.arange(8, dtype=np.uint8)[:, None], storage)
    assert packed.dtype == np.int32 and packed.shape == (1, 1)
    assert hex(int(packed[0, 0]) & 0xFFFFFFFF) == words


def test_gptq_zero_points_stand_group_by_output_word():
    points = np.zeros((16, 3), np.uint8)
    points[9, 2] = 5  # output 9 is nibble 1 of word 1; group 2 is row 2
    packed = pack_gptq_zero_points(points, ZeroPointStorage.V2)
    assert packed.shape == (3, 2)
    assert packed.tolist() == [[0, 0], [0, 0], [0, 0x50]]


@pytest.mark.parametrize("storage", list(ZeroPointStorage))
def test_every_pair_of_code_and_zero_point_survives(storage):
    code, point = (grid.ravel() for grid in np.meshgrid(np.arange(16), np.arange(16), indexing="ij"))
    codes = np.repeat(code.astype(np.uint8)[:, None], 8, axis=1)
    points = point.astype(np.uint8)[:, None]
    assert np.array_equal(unpack_gptq_codes(pack_gptq_codes(codes)), codes)
    assert np.array_equal(unpack_gptq_zero_points(pack_gptq_zero_points(points, storage), storage), points)
    both = np.stack([codes[:, 0], points[:, 0]])
    assert np.array_equal(unpack_nibbles_low_first(pack_nibbles_low_first(both), both.shape), both)


@given(st.data())
def test_nibbles_come_back_from_any_shape(data):
    rows = data.draw(st.integers(0, 7))
    columns = data.draw(st.integers(1, 9).filter(lambda n: rows * n % 2 == 0))
    codes = data.draw(arrays(np.uint8, (rows, columns), elements=NIBBLES))
    packed = pack_nibbles_low_first(codes)
    assert packed.size * 2 == codes.size
    assert np.array_equal(unpack_nibbles_low_first(packed, codes.shape), codes)
    expected = [int(a) + 16 * int(b) for a, b in zip(codes.flat[::2], codes.flat[1::2], strict=True)]
    assert packed.tolist() == expected


@given(st.data())
def test_words_come_back_and_hold_value_k_at_bits_4k(data):
    words, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    values = data.draw(arrays(np.uint8, (8 * words, columns), elements=NIBBLES))
    packed = pack_words_low_first(values)
    assert np.array_equal(unpack_words_low_first(packed), values)
    for i in range(words):
        for j in range(columns):
            expected = sum(int(values[8 * i + k, j]) << 4 * k for k in range(8))
            assert int(packed[i, j]) & 0xFFFFFFFF == expected


@given(st.data(), st.sampled_from(ZeroPointStorage))
def test_gptq_tensors_come_back(data, storage):
    out, columns, groups = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    codes = data.draw(arrays(np.uint8, (out, 8 * columns), elements=NIBBLES))
    points = data.draw(arrays(np.uint8, (8 * out, groups), elements=NIBBLES))
    assert np.array_equal(unpack_gptq_codes(np.asfortranarray(pack_gptq_codes(codes))), codes)
    assert np.array_equal(unpack_gptq_zero_points(pack_gptq_zero_points(points, storage), storage), points)


def test_features_that_do_not_fill_words_are_refused():
    with pytest.raises(BadInput, match="eight values"):
        pack_gptq_codes(np.zeros((4, 12), np.uint8))
    with pytest.raises(BadInput, match="eight values"):
        pack_gptq_zero_points(np.zeros((12, 2), np.uint8), ZeroPointStorage.V1)


def hexadecimal(words):
    return [[f"{int(word) & 0xFFFFFFFF:08x}" for word in row] for row in words]


def test_awq_words_hold_even_outputs_below_odd_ones():
    # Elements 0 2 4 6 stand in the low half, 1 3 5 7 in the high half.
    packed = pack_awq_words(u8([*range(8), *range(15, 7, -1)], [0, 15, 0, 0, 0, 0, 0, 0] * 2))
    assert packed.dtype == np.int32 and packed.shape == (2, 2)
    assert hexadecimal(packed) == [["75316420", "8ace9bdf"], ["000f0000", "000f0000"]]


def test_one_awq_element_at_a_time():
    assert AWQ_ORDER == (0, 4, 1, 5, 2, 6, 3, 7)
    words = ["0000000f", "000f0000", "000000f0", "00f00000", "00000f00", "0f000000", "0000f000", "f0000000"]
    assert hexadecimal(pack_awq_words(np.eye(8, dtype=np.uint8) * 15)) == [[word] for word in words]


def test_row_words_hold_eight_columns_and_end_in_zeros():
    packed = pack_row_words(u8([*range(8), 9], [15] * 9))
    assert packed.dtype == np.int32 and packed.shape == (2, 2)
    assert hexadecimal(packed) == [["76543210", "00000009"], ["ffffffff", "0000000f"]]
    assert unpack_row_words(packed).tolist() == [[*range(8), 9, *[0] * 7], [15] * 9 + [0] * 7]


@given(st.data())
def test_awq_words_come_back(data):
    rows, words = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    values = data.draw(arrays(np.uint8, (rows, 8 * words), elements=NIBBLES))
    packed = pack_awq_words(values)
    assert np.array_equal(unpack_awq_words(np.asfortranarray(packed)), values)
    for i in range(rows):
        for j in range(words):
            eight = values[i, 8 * j : 8 * j + 8].tolist()
            expected = sum(value << 4 * k for k, value in enumerate(eight[0::2] + eight[1::2]))
            assert int(packed[i, j]) & 0xFFFFFFFF == expected


@given(st.data())
def test_row_words_come_back_with_their_filling(data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    values = data.draw(arrays(np.uint8, (rows, columns), elements=NIBBLES))
    unpacked = unpack_row_words(np.asfortranarray(pack_row_words(values)))
    assert unpacked.shape == (rows, -(-columns // 8) * 8)
    assert np.array_equal(unpacked[:, :columns], values) and not unpacked[:, columns:].any()


def test_outputs_that_do_not_fill_awq_words_are_refused():
    with pytest.raises(BadInput, match="eight values") as caught:
        pack_awq_words(np.zeros((4, 12), np.uint8))
    assert caught.value.code == "E_PACK"
