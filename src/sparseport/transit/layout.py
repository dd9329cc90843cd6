"""What an archive knows about the bytes of a tensor: plain data that the packer finds out and the unpacker is told.

Nothing here can make an archive wrong. A layout that is mistaken costs size, never a bit.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

BITS = (4, 8, 16, 32, 64)
"""Sizes that an element may have."""

PIECE_BYTES, PIECE_ELEMENTS = 8 << 20, 4 << 20
"""Bytes of no known structure, and elements, that are packed at once: what one piece needs in memory goes with them."""

# Rows of zero-points may have room behind them, but not any amount: 4 times their length, or 64 elements.
_WIDEST_PITCH, _LEAST_PITCH = 4, 64


@dataclass(frozen=True)
class Points:
    """Where the zero-points of a tensor of codes lie: elements as wide as the codes, in the same file.

    offset  first byte
    count   number of zero-points
    pitch   zero-points from one row of them to the next
    rows    rows of codes that share a row of zero-points
    columns columns of codes that share a zero-point

    The zero-point of the code at [r, c] is number (r // rows) * pitch + c // columns.
    """

    offset: int
    count: int
    pitch: int
    rows: int
    columns: int

    def end(self, bits: int) -> int:
        """One past their last byte, for zero-points of 4 or 8 bits."""
        return self.offset - (-self.count * bits // 8)


@dataclass(frozen=True)
class Elements:
    """Bytes as a matrix of elements.

    bits     of an element: 4 (two to a byte, the first in the low half), 8, 16, 32 or 64 (little endian)
    columns  elements in a row
    centre   the element that stands for zero, where there are no zero-points
    points   zero-points, or None
    """

    bits: int
    columns: int
    centre: int = 0
    points: Points | None = None

    def is_whole(self, size: int) -> bool:
        """Whether `size` bytes are whole rows, of a length that one piece can hold."""
        return 0 < self.columns <= PIECE_ELEMENTS and size % self.row_step() == 0

    def points_fit(self, size: int, file_size: int) -> bool:
        """Whether the zero-points of a tensor of `size` bytes, if any, lie in a file of `file_size` bytes."""
        points = self.points
        if points is None:
            return True
        if min(points.offset, points.pitch - 1, points.rows - 1, points.columns - 1) < 0 or self.bits > 8:
            return False
        # No wider than a row, and rows of them close together: what is read at once stays as small as the piece.
        across = (self.columns - 1) // points.columns + 1
        if points.columns > self.columns or points.pitch > max(_WIDEST_PITCH * across, _LEAST_PITCH):
            return False
        rows = size * 8 // (self.bits * self.columns)
        last = (rows - 1) // points.rows * points.pitch + (self.columns - 1) // points.columns
        return rows > 0 and last < points.count and points.end(self.bits) <= file_size

    def row_step(self) -> int:
        """Bytes of the fewest rows that fill whole bytes."""
        return self.columns * self.bits // 8 if self.columns * self.bits % 8 == 0 else self.columns

    def piece_size(self) -> int:
        """Bytes per piece: the most rows that `PIECE_ELEMENTS` holds, and at least the fewest that fill whole bytes."""
        step = self.row_step()
        return max(PIECE_ELEMENTS * self.bits // 8 // step, 1) * step


@dataclass(frozen=True)
class Region:
    """A tensor in a file: `size` bytes from `offset`."""

    offset: int
    size: int
    elements: Elements

    @property
    def end(self) -> int:
        return self.offset + self.size


Extent = tuple[int, int]
"""First byte and number of bytes of a stretch of a file."""


@dataclass(frozen=True)
class Part:
    """Stretches of a file that are packed together, in pieces, or that repeat what an earlier file holds.

    extents   where the bytes belong; packed is what stands there, one after the other
    elements  what the bytes are, or None
    copy      (number of a file, number of a part of it, first byte in what that part packs) of the same bytes, earlier
              in the archive; or None
    packed    length of each packed piece in bytes; empty for a copy
    """

    extents: tuple[Extent, ...]
    elements: Elements | None = None
    copy: tuple[int, int, int] | None = None
    packed: tuple[int, ...] = ()

    @cached_property
    def size(self) -> int:
        """Bytes when unpacked."""
        return sum(size for _, size in self.extents)

    def piece_size(self) -> int:
        """Bytes of each piece when unpacked; the last one may have fewer."""
        return PIECE_BYTES if self.elements is None else self.elements.piece_size()

    def piece_count(self) -> int:
        """How many pieces there are."""
        return -(-self.size // self.piece_size())

    def packed_limit(self) -> int:
        """Bytes that no packed piece of this part needs more than: bytes as they are, in a frame."""
        size = min(self.size, self.piece_size())
        return size + size // 1024 + 1024

    def pieces(self) -> Iterator[Extent]:
        """First byte and bytes of each piece when unpacked, in what is packed."""
        step, size = self.piece_size(), self.size
        for first in range(0, size, step):
            yield first, min(step, size - first)

    def within(self, first: int, size: int) -> Iterator[Extent]:
        """The extents of `size` bytes from byte `first` of what is packed."""
        number = bisect.bisect_right(self._starts, first) - 1
        while size > 0 and number < len(self.extents):
            offset, length = self.extents[number]
            skipped = first - self._starts[number]
            taken = min(length - skipped, size)
            yield offset + skipped, taken
            first, size, number = first + taken, size - taken, number + 1

    @cached_property
    def _starts(self) -> list[int]:
        """Where each extent begins in what is packed."""
        return list(itertools.accumulate((size for _, size in self.extents[:-1]), initial=0))
