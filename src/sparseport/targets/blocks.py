"""The scratch file between merging and writing: packed weights leave memory as soon as they are made.

Merging appends blocks of bytes; a target's constants are then memory-mapped views of the same file, or copies of them
in another order, so that neither step holds more than one layer.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from sparseport.weights.linear import U8, Array

# Memory maps want aligned starts; 64 bytes is a cache line and what OpenVINO itself uses.
_ALIGNMENT = 64
_PIECE = 8 << 20


@dataclass(frozen=True)
class Block:
    """A stretch of the file: `shape` elements of `element_type` (the target's name of the type) from byte `offset`."""

    offset: int
    size: int
    element_type: str
    shape: tuple[int, ...]


class BlockFile:
    """Append-only scratch file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._map: U8 | None = None

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let go of the memory map; views handed out by `view` stay valid."""
        self._file.close()
        self._map = None

    def append(self, array: Array, element_type: str, shape: tuple[int, ...]) -> Block:
        """Write an array's bytes in C order."""
        offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
        self._file.write(b"\0" * (offset - self._file.tell()))
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._file.write(data.data)
        return Block(offset, data.size, element_type, shape)

    def pieces(self, block: Block) -> Iterator[bytes]:
        """The block's bytes in order, a few megabytes at a time, without mapping the file."""
        self._file.flush()
        with self.path.open("rb") as file:
            file.seek(block.offset)
            left = block.size
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise OSError(errno.EIO, "the scratch file is shorter than what was written", str(self.path))
                left -= len(piece)
                yield piece

    def view(self, block: Block) -> U8:
        """The block's bytes, memory-mapped, read-only: uint8 [size]."""
        self._file.flush()
        if self._map is None or self._map.size < block.offset + block.size:
            self._map = np.memmap(self.path, np.uint8, "r")
        return self._map[block.offset : block.offset + block.size]
