"""Bytes that an earlier part of the archive holds already: a second runtime's codes and embedding, its tokenizer.

The same layer has the same bytes in both runtimes, but not always alone: a fused q, k, v is three layers of the other
folder in a row. So a tensor is looked for stretch by stretch, each of which has to begin where an earlier one begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from sparseport.transit.layout import Extent, Part
from sparseport.transit.stretches import gather

_LEAST = 1024  # bytes that are worth an entry of their own
_PREFIX = 64
_BLOCK = 1 << 20


@dataclass(frozen=True)
class _Source:
    """A stretch of an earlier file.

    name    of the file
    extent  where it stands
    copy    where it stands in the archive, as `Part.copy` says it
    """

    name: str
    extent: Extent
    copy: tuple[int, int, int]


class Copies:
    """The stretches that were packed so far, by their first bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[bytes, list[_Source]] = {}

    def add(self, name: str, number: int, place: int, part: Part) -> None:
        """Remember part `place` of file `number`, which is named `name`."""
        position = 0
        with (self._folder / name).open("rb") as file:
            for first, size in part.extents:
                if part.copy is None and size >= _LEAST:
                    source = _Source(name, (first, size), (number, place, position))
                    self._known.setdefault(gather(file, [(first, _PREFIX)]), []).append(source)
                position += size

    def split(self, name: str, part: Part) -> tuple[list[Part], Part | None]:
        """What earlier parts hold of a part of a file, as copies, and what is new; None if nothing is.

        An extent is known whole or counts as new.
        """
        copies: list[Part] = []
        new: list[Extent] = []
        with (self._folder / name).open("rb") as file:
            for extent in part.extents:
                found = self._find(file, extent)
                if found is None:
                    new.append(extent)
                for copy in found or ():
                    _append(copies, copy)
        return copies, replace(part, extents=tuple(new)) if new else None

    def _find(self, file: BinaryIO, extent: Extent) -> list[Part] | None:
        """A stretch of a file as copies; None if any of its bytes are new."""
        first, size = extent
        found = []
        while size:
            if size < _LEAST or (source := self._longest(file, (first, size))) is None:
                return None
            length = min(source.extent[1], size)
            found.append(Part(((first, length),), copy=source.copy))
            first, size = first + length, size - length
        return found

    def _longest(self, file: BinaryIO, extent: Extent) -> _Source | None:
        """The longest earlier stretch that a stretch begins with, or that begins with it."""
        known = self._known.get(gather(file, [(extent[0], _PREFIX)]), [])
        longest = sorted(known, key=lambda source: -source.extent[1])
        return next((source for source in longest if self._same(source, file, extent)), None)

    def _same(self, source: _Source, file: BinaryIO, extent: Extent) -> bool:
        size = min(source.extent[1], extent[1])
        with (self._folder / source.name).open("rb") as other:
            return all(
                gather(other, [(source.extent[0] + start, length)]) == gather(file, [(extent[0] + start, length)])
                for start, length in _blocks(size)
            )


def _append(copies: list[Part], copy: Part) -> None:
    """Add a copy to a list; one that goes on where the last ends becomes part of it."""
    last = copies[-1] if copies else None
    if last is not None and last.copy is not None and copy.copy is not None:
        number, place, first = last.copy
        if (number, place, first + last.size) == copy.copy:
            copies[-1] = replace(last, extents=last.extents + copy.extents)
            return
    copies.append(copy)


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, size, _BLOCK):
        yield first, min(_BLOCK, size - first)
