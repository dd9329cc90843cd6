"""Bytes of files: taken together from their stretches, and put back where they belong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

from sparseport.errors import EnvironmentProblem
from sparseport.transit.layout import Extent


def gather(file: BinaryIO, extents: Iterable[Extent]) -> bytes:
    """What stands in some stretches of a file, one after the other.

    Raises:
        EnvironmentProblem: the file ends before them.
    """
    found = []
    for first, size in extents:
        file.seek(first)
        data = file.read(size)
        if len(data) != size:
            raise EnvironmentProblem("a file became shorter while it was read", where=file.name, fix="try again")
        found.append(data)
    return found[0] if len(found) == 1 else b"".join(found)


def scatter(file: BinaryIO, extents: Iterable[Extent], data: memoryview) -> None:
    """The inverse of `gather`: write bytes into some stretches of a file."""
    position = 0
    for first, size in extents:
        file.seek(first)
        file.write(data[position : position + size])
        position += size
