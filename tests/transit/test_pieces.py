"""Transforms of a piece: literal bytes, there and back for everything, and against a reader in plain loops."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import packed_archives as archives
from sparseport.errors import BadInput
from sparseport.transit import pieces
from sparseport.transit.layout import Elements, Points
from sparseport.transit.pieces import (
    pack_elements,
    pack_plain,
    points_extent,
    points_of_rows,
    to_elements,
    unpack_piece,
)


def packed_with(data, elements, zero_points, ways):
    with mock.patch.object(pieces, "CLASSES", ways), mock.patch.object(pieces, "_FEWEST_COLUMNS", 1):
        return pack_elements(to_elements(data, elements, zero_points), elements.bits)


def test_literal_nibbles():
    """Codes 8 8 9 7 around a zero-point of 8: two bits of four are set, and 1 and 15 are left."""
    data = np.array([0x88, 0x79], np.uint8)
    packed = packed_with(data, Elements(4, 4, centre=8), None, (1,))
    # Frames of one raw byte: magic, checksum and single segment flags, size 1, last raw block of 1, byte, checksum.
    assert packed[:5] == b"\x01" + (14).to_bytes(4, "little")
    assert packed[5:15] == bytes.fromhex("28b52ffd 24 01 090000 30") and packed[5 + 14 + 4 :][9] == 0xF1
    by_hand = b"\x01" + archives.stream(b"\x30") + archives.stream(b"\xf1")
    assert unpack_piece(by_hand, 2, Elements(4, 4, centre=8), None, "x").tobytes() == data.tobytes()


def test_literal_halves_in_two_classes():
    """Column 0 of [[0, 1, 2], [0, 3, 0x0104]] holds two zeros, the others none: classes 0, 0 and 1 of two."""
    data = np.array([[0, 1, 2], [0, 3, 0x0104]], "<u2").reshape(-1).view(np.uint8)
    streams = (b"\x10\x01", b"\x00", b"", b"", b"\xf0", b"\x00\x00\x00\x01", b"\x01\x02\x03\x04")
    by_hand = b"\x02" + b"".join(archives.stream(one) for one in streams)
    assert unpack_piece(by_hand, 12, Elements(16, 3), None, "x").tobytes() == data.tobytes()
    packed = packed_with(data, Elements(16, 3), None, (2,))
    assert archives.unpack_piece(packed, 12, {"bits": 16, "columns": 3}, 0, b"") == data.tobytes()


@given(st.data())
def test_there_and_back(data):
    """Any elements, with zero-points of any kind, in any number of classes; the plain reader agrees."""
    bits = data.draw(st.sampled_from([4, 8, 16, 32, 64]))
    columns = data.draw(st.integers(1, 9))
    rows = data.draw(st.integers(1, 6).filter(lambda n: n * columns * bits % 8 == 0))
    size = rows * columns * bits // 8
    raw = data.draw(arrays(np.uint8, size, elements=st.sampled_from([0, 0, 0, 1, 0x88, 255]), fill=st.nothing()))
    high, wide = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    across, down = -(-columns // wide), -(-rows // high)
    pitch = across + data.draw(st.integers(0, 2))
    count = pitch * down
    table = (
        data.draw(arrays(np.uint8, -(-count * bits // 8), fill=st.nothing())) if bits <= 8 else np.zeros(0, np.uint8)
    )
    points = Points(0, count, pitch, high, wide) if bits <= 8 and data.draw(st.booleans()) else None
    elements = Elements(bits, columns, 0 if points else data.draw(st.sampled_from([0, 8])), points)
    zero_points = None
    if points is not None:
        first, length, skip = points_extent(points, bits, columns, 0, rows)
        zero_points = points_of_rows(table[first : first + length], skip, points, bits, columns, 0, rows)
    ways = data.draw(st.sampled_from([(1,), (2,), (8,), (16,), (1, 8)]))
    packed = packed_with(raw, elements, zero_points, ways)
    assert unpack_piece(packed, size, elements, zero_points, "x").tobytes() == raw.tobytes()
    part = {"bits": bits, "columns": columns, "centre": elements.centre}
    part |= {"points": [0, count, pitch, high, wide]} if points else {}
    assert archives.unpack_piece(packed, size, part, 0, b"" if table is None else table.tobytes()) == raw.tobytes()


@given(st.integers(0, 20), st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.sampled_from([4, 8]))
def test_zero_points_of_later_rows(first, rows, high, wide, bits):
    """Rows from the middle of a tensor get the zero-points that the formula names, wherever nibbles begin."""
    columns, across = 7, -(-7 // wide)
    pitch = across + first % 2
    count = pitch * (-(-(first + rows) // high))
    table = np.random.default_rng(first).integers(0, 256, -(-count * bits // 8)).astype(np.uint8)
    points = Points(3, count, pitch, high, wide)
    begin, length, skip = points_extent(points, bits, columns, first, rows)
    assert begin >= 3 and begin + length <= 3 + table.size
    found = points_of_rows(table[begin - 3 : begin - 3 + length], skip, points, bits, columns, first, rows)
    numbers = [[(first + r) // high * pitch + c // wide for c in range(columns)] for r in range(rows)]
    assert found.tolist() == [[archives.element(table, number, bits) for number in row] for row in numbers]


@pytest.mark.parametrize("bits", [16, 32])
def test_lower_planes_are_cut_where_the_reader_expects(bits):
    """More than 8192 elements under several highest bytes: several streams per plane, the rest in the last one."""
    random = np.random.default_rng(0)
    values = random.integers(0, 1 << 16, 40_000).astype(f"<u{bits // 8}") << np.uint8(bits - 16)
    values &= np.array((7 << bits - 8) | ((1 << bits - 8) - 1), values.dtype)
    raw = values.view(np.uint8)
    elements = Elements(bits, 100)
    packed = packed_with(raw, elements, None, (1,))
    assert unpack_piece(packed, raw.size, elements, None, "x").tobytes() == raw.tobytes()
    assert archives.unpack_piece(packed, raw.size, {"bits": bits, "columns": 100}, 0, b"") == raw.tobytes()


def test_sparse_codes_come_close_to_their_entropy():
    """Half of the codes pruned, more in some columns: below the entropy of their frequencies, and plain is above."""
    random = np.random.default_rng(0)
    share = np.linspace(0.1, 0.9, 512)
    codes = np.where(random.random((512, 512)) < share, 0, 1 + random.integers(0, 15, (512, 512)))
    counts = np.bincount(codes.reshape(-1))
    entropy = -(counts / codes.size * np.log2(counts / codes.size)).sum()
    packed = pack_elements(codes.astype(np.uint8), 4)
    both = np.array(codes, np.uint8).reshape(-1, 2)
    plain = pack_plain((both[:, 0] | both[:, 1] << 4).astype(np.uint8), 1)
    assert 8 * len(packed) / codes.size < 0.98 * entropy < entropy < 8 * len(plain) / codes.size
    conditional = -(share * np.log2(share) + (1 - share) * np.log2((1 - share) / 15)).mean()
    assert 8 * len(packed) / codes.size < 1.04 * conditional


def test_the_smallest_number_of_classes_is_taken():
    random = np.random.default_rng(0)
    even = (random.random((64, 64)) < 0.5).astype(np.uint8)
    uneven = (random.random((4096, 64)) < np.linspace(0, 1, 64)).astype(np.uint8)
    assert pack_elements(even, 4)[0] == 1 and pack_elements(uneven, 4)[0] == 8


GOOD = packed_with(np.arange(1, 65, dtype=np.uint8), Elements(8, 8), None, (2,))


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\x11" + GOOD[1:],
        GOOD[:-1],
        GOOD + b"\0",
        GOOD[:3],
        b"\0" + archives.stream(bytes(63)),
        b"\0" + archives.stream(bytes(65)),
        b"\0" + archives.stream(bytes(64)) + b"\0",
        b"\0\x05\0\0\0hello",
        b"\x02" + archives.stream(b"\x22" * 4) + GOOD[len(archives.stream(bytes(4))) + 1 :],
    ],
)
def test_what_no_packer_wrote_is_refused(packed):
    with pytest.raises(BadInput) as caught:
        unpack_piece(packed, 64, Elements(8, 8), None, "out.sparseport, a.bin")
    assert caught.value.code == "E_ARCHIVE" and caught.value.where == "out.sparseport, a.bin"


def test_elements_without_a_layout_are_refused():
    with pytest.raises(BadInput, match="damaged"):
        unpack_piece(GOOD, 64, None, None, "x")


def test_every_changed_bit_of_a_piece_is_noticed_or_harmless():
    """Every frame carries a checksum, so a changed bit never becomes other bytes."""
    data = np.arange(1, 65, dtype=np.uint8).tobytes()
    for position in range(len(GOOD)):
        for bit in range(8):
            wrong = bytearray(GOOD)
            wrong[position] ^= 1 << bit
            try:
                found = unpack_piece(bytes(wrong), 64, Elements(8, 8), None, "x").tobytes()
            except BadInput:
                continue
            assert found == data, (position, bit)
