"""Byte streams through the entropy coder: Zstandard (RFC 8878), one frame per stream.

Every frame states its content's size and ends with a checksum. All that one piece needs stands in a row:

    length of the frame, uint32 little endian | the frame | length | frame | ...

A stream of no bytes has no frame: its length is 0.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparseport.errors import BadInput
from sparseport.extras import missing
from sparseport.weights.linear import U8

FAST = 1
"""Level for streams in which nothing repeats: the coder then gives each byte its share of bits and looks no further."""

SLOW = 19
"""Level for text and graphs, which repeat themselves."""

_LENGTH = struct.Struct("<I")


def zstandard() -> Any:
    """The package that holds the coder.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise missing("zstandard", "pack") from error
    return zstandard


def compress(data: U8 | bytes, level: int) -> bytes:
    """One frame, with its content's size and checksum; nothing for no bytes."""
    if not len(data):
        return b""
    coder = zstandard().ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
    packed: bytes = coder.compress(np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else data)
    return packed


def stated_size(frame: bytes, where: str) -> int:
    """How many bytes a frame says that it holds, -1 if it does not say.

    Raises:
        BadInput: this is no frame.
    """
    package = zstandard()
    try:
        return int(package.frame_content_size(frame))
    except package.ZstdError as error:
        raise damaged(where, found=str(error)[:80]) from error


def decompress(frame: bytes, size: int, where: str) -> bytes:
    """The content of one frame, which must be of a known size: nothing is allocated for a frame that states another.

    Raises:
        BadInput: the frame is damaged, followed by something, or of another size.
    """
    package = zstandard()
    if (stated := stated_size(frame, where)) != size:
        raise damaged(where, expected=f"{size} bytes", found=f"a frame of {stated}")
    try:
        decoder = package.ZstdDecompressor(max_window_size=1 << 25)
        data: bytes = decoder.decompress(frame, max_output_size=size, allow_extra_data=False)
    except package.ZstdError as error:
        raise damaged(where, found=str(error)[:80]) from error
    if len(data) != size:
        raise damaged(where, expected=f"{size} bytes", found=len(data))
    return data


def join(frames: Sequence[bytes]) -> bytes:
    """Frames in a row, each behind its length; an empty frame stands for an empty stream."""
    return b"".join(_LENGTH.pack(len(frame)) + frame for frame in frames)


class StreamReader:
    """Takes the streams of a piece one by one."""

    def __init__(self, data: bytes, where: str) -> None:
        self._data, self._where, self._position = data, where, 0

    def take(self, size: int) -> U8:
        """The next stream, which holds `size` bytes: uint8 [size].

        Raises:
            BadInput: it is missing, damaged, or of another size.
        """
        start = self._position + _LENGTH.size
        if start > len(self._data):
            raise damaged(self._where, found="a piece that ends too early")
        (length,) = _LENGTH.unpack_from(self._data, self._position)
        if start + length > len(self._data):
            raise damaged(self._where, found="a piece that ends too early")
        self._position = start + length
        if size == length == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(decompress(self._data[start : start + length], size, self._where), np.uint8)

    def end(self) -> None:
        """Check that nothing is left.

        Raises:
            BadInput: bytes follow the last stream.
        """
        if self._position != len(self._data):
            raise damaged(self._where, found="bytes behind the last stream")


def damaged(where: str, *, expected: object = None, found: object = None) -> BadInput:
    """The error for an archive whose bytes are not what the packer wrote."""
    return BadInput(
        "the archive is damaged",
        where=where,
        expected=expected,
        found=found,
        fix="copy it again from its source",
        code="E_ARCHIVE",
    )
