"""One piece of a file, packed and unpacked: the transforms before the entropy coder. Pure functions, lossless.

A packed piece is one byte, the number of classes, and streams (see `streams`):

0        one stream: the bytes as they are.
1 .. 16  the bytes are elements. Each is taken minus its zero-point (modulo 2 to the number of bits), so that what was
         pruned is 0. Columns belong to classes, the emptiest columns to the first: pruning by activations leaves some
         columns much emptier than others. Streams: with several classes, the class of each column (two to a byte, the
         first in the low half); then for each class one bit per element, row by row, the first in the highest bit: is
         it not 0; then the elements that are not, cut into planes. 4-bit elements are one plane, two to a byte, the
         first in the low half. Wider ones have a plane per byte, the highest byte first. In the planes below, bytes are
         sorted by the highest byte of their element (and stay in order where that is equal), and cut into streams
         behind a value of it as soon as 8192 bytes have come together: each stream holds bytes of one kind.

Zeros apart from values, and both by classes of columns, come closest to their entropy with a coder that spends whole
bits per symbol: docs/transit.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseport.transit.layout import Elements, Points
from sparseport.transit.streams import FAST, StreamReader, compress, damaged, join
from sparseport.weights.linear import U8
from sparseport.weights.packing import pack_nibbles_low_first, unpack_nibbles_low_first

CLASSES = (1, 8)
"""Numbers of classes that the packer tries."""

MAX_CLASSES = 16

# A table of the coder per class has to pay: fewer columns are one class.
_FEWEST_COLUMNS = 64

# Bytes of a lower plane that are worth a stream of their own.
_RUN = 8192

Uints = NDArray[np.unsignedinteger[Any]]


def pack_plain(data: bytes | U8, level: int) -> bytes:
    """Pack bytes of no known structure."""
    return b"\0" + join([compress(data, level)])


def pack_elements(values: Uints, bits: int) -> bytes:
    """Pack elements whose zeros are 0, with the number of classes that gives the fewest bytes.

    Args:
        values: [rows, columns] as `to_elements` gives them.
        bits: of an element.
    """
    ways = CLASSES if values.shape[1] >= _FEWEST_COLUMNS else CLASSES[:1]
    return min((_pack_classes(values, bits, classes) for classes in ways), key=len)


def unpack_piece(packed: bytes, size: int, elements: Elements | None, zero_points: U8 | None, where: str) -> U8:
    """The bytes of a packed piece: uint8 [size].

    Args:
        packed: the piece.
        size: bytes when unpacked; with elements, whole rows.
        elements: what the part says that its bytes are.
        zero_points: [rows, columns] as `points_of_rows` gives them; None where the elements have none.
        where: what to name in errors.

    Raises:
        BadInput: E_ARCHIVE, these bytes were not written by the packer.
    """
    if not packed or packed[0] > MAX_CLASSES or (packed[0] and elements is None):
        raise damaged(where, found="a piece of an unknown kind")
    streams = StreamReader(packed[1:], where)
    if packed[0] == 0:
        data = streams.take(size)
        streams.end()
        return data
    assert elements is not None
    rows = size * 8 // (elements.bits * elements.columns)
    values = _unpack_classes(streams, rows, elements.columns, elements.bits, packed[0], where)
    streams.end()
    return from_elements(values, elements, zero_points)


def to_elements(data: U8, elements: Elements, zero_points: U8 | None) -> Uints:
    """Bytes as elements [rows, columns] minus their zero-points; 4-bit ones as uint8 below 16.

    Args:
        data: uint8, whole rows.
        zero_points: [rows, columns], or None.
    """
    if elements.bits == 4:
        flat: Uints = _singles(data)
    else:
        flat = data.view(f"<u{elements.bits // 8}")
    values = flat.reshape(-1, elements.columns)
    centre = zero_points if zero_points is not None else values.dtype.type(elements.centre)
    if zero_points is None and not elements.centre:
        return values
    moved: Uints = values - centre  # modulo the width of the dtype
    return moved & np.uint8(15) if elements.bits == 4 else moved


def from_elements(values: Uints, elements: Elements, zero_points: U8 | None) -> U8:
    """The inverse of `to_elements`: uint8 [bytes]."""
    centre = zero_points if zero_points is not None else values.dtype.type(elements.centre)
    moved = values + centre if zero_points is not None or elements.centre else values
    if elements.bits == 4:
        return _pairs((moved & np.uint8(15)).reshape(-1))
    return np.ascontiguousarray(moved).reshape(-1).view(np.uint8)


def points_extent(points: Points, bits: int, columns: int, first: int, rows: int) -> tuple[int, int, int]:
    """Where the zero-points of some rows of codes lie: first byte and bytes in the file, and elements to skip there.

    Args:
        points: of the tensor.
        bits: of a zero-point, 4 or 8.
        columns: codes in a row.
        first: number of the first row.
        rows: number of rows.
    """
    start = first // points.rows * points.pitch
    end = (first + rows - 1) // points.rows * points.pitch + (columns - 1) // points.columns + 1
    begin = start * bits // 8
    return points.offset + begin, -(-end * bits // 8) - begin, start - begin * 8 // bits


def points_of_rows(data: U8, skip: int, points: Points, bits: int, columns: int, first: int, rows: int) -> U8:
    """The zero-point of every code of some rows: uint8 [rows, columns], from the bytes that `points_extent` names."""
    flat = _singles(data) if bits == 4 else data
    across = (columns - 1) // points.columns + 1
    down = (first + rows - 1) // points.rows - first // points.rows + 1
    starts = skip + points.pitch * np.arange(down)
    table = flat[starts[:, None] + np.arange(across)]
    wide = np.repeat(table, points.columns, axis=1)[:, :columns]
    if points.rows == 1:
        return wide
    return wide[(first + np.arange(rows)) // points.rows - first // points.rows]


def _pack_classes(values: Uints, bits: int, classes: int) -> bytes:
    frames = []
    class_of = np.zeros(values.shape[1], np.uint8)
    if classes > 1:
        class_of = _classes_of_columns(values, classes)
        frames.append(compress(_pairs(class_of), FAST))
    for number in range(classes):
        some = values if classes == 1 else values[:, class_of == number]
        kept = some != 0
        frames.append(compress(np.packbits(kept), FAST))
        frames.extend(compress(plane, FAST) for plane in _planes(some[kept], bits))
    return bytes([classes]) + join(frames)


def _unpack_classes(streams: StreamReader, rows: int, columns: int, bits: int, classes: int, where: str) -> Uints:
    dtype = np.uint8 if bits == 4 else np.dtype(f"<u{bits // 8}")
    values: Uints = np.zeros((rows, columns), dtype)
    class_of = np.zeros(columns, np.uint8)
    if classes > 1:
        class_of = _singles(streams.take(-(-columns // 2)))[:columns]
        if class_of.max(initial=0) >= classes:
            raise damaged(where, expected=f"classes below {classes}", found=int(class_of.max()))
    for number in range(classes):
        members = np.flatnonzero(class_of == number)
        count = rows * members.size
        kept = np.unpackbits(streams.take(-(-count // 8)), count=count).astype(bool).reshape(rows, -1)
        some = np.zeros(kept.shape, dtype)
        some[kept] = _take_planes(streams, int(kept.sum()), bits)
        values[:, members] = some
    return values


def _classes_of_columns(values: Uints, classes: int) -> U8:
    """Columns in order of how many zeros they hold, cut into classes of equal numbers: uint8 [columns]."""
    order = np.argsort(np.count_nonzero(values, axis=0), kind="stable")
    class_of = np.empty(order.size, np.uint8)
    class_of[order] = np.arange(order.size) * classes // order.size
    return class_of


def _planes(values: Uints, bits: int) -> Iterator[U8]:
    """Elements [n] as streams of bytes."""
    if bits == 4:
        yield _pairs(values)
        return
    table = np.ascontiguousarray(values).view(np.uint8).reshape(values.size, bits // 8)
    yield table[:, -1]
    order, ends = _by_highest(table[:, -1])
    for place in range(table.shape[1] - 2, -1, -1):
        yield from np.split(table[order, place], ends)


def _take_planes(streams: StreamReader, count: int, bits: int) -> Uints:
    """The inverse of `_planes`: elements [count]."""
    if bits == 4:
        return _singles(streams.take(-(-count // 2)))[:count]
    table = np.empty((count, bits // 8), np.uint8)
    table[:, -1] = streams.take(count)
    order, ends = _by_highest(table[:, -1])
    for place in range(table.shape[1] - 2, -1, -1):
        for some in np.split(order, ends):
            table[some, place] = streams.take(some.size)
    return table.view(f"<u{bits // 8}").reshape(-1)


def _by_highest(highest: U8) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The order in which lower planes stand, and where it is cut.

    A cut is made behind a value of the highest byte as soon as `_RUN` bytes have come together.
    """
    order = np.argsort(highest, kind="stable")
    ends, last = [], 0
    for end in np.cumsum(np.bincount(highest, minlength=256)):
        if end - last >= _RUN:
            ends.append(end)
            last = end
    return order, np.array(ends[: -1 if last == highest.size else None], np.intp)


def _pairs(values: Uints) -> U8:
    """Numbers below 16 [n], two to a byte; an odd last one has its byte to itself."""
    small = values.astype(np.uint8)
    return pack_nibbles_low_first(small if small.size % 2 == 0 else np.append(small, np.uint8(0)))


def _singles(data: U8) -> U8:
    return unpack_nibbles_low_first(data, (2 * data.size,))
