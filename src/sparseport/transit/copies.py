"""Bytes that an earlier part of the archive holds already: a second runtime's codes and embedding, its tokenizer.

The same layer has the same bytes in both runtimes, but not always alone: a fused q, k, v is three layers of the other
folder in a row. So a part is looked for piece by piece, each of which has to begin where an earlier part begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sparseport.transit.layout import Part
from sparseport.transit.stretches import gather

_LEAST = 4096  # bytes that are worth an entry of their own
_PREFIX = 64
_BLOCK = 1 << 20


@dataclass(frozen=True)
class _Source:
    name: str
    number: int
    place: int
    part: Part


class Copies:
    """The parts that were packed so far, by their first bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[bytes, list[_Source]] = {}

    def add(self, name: str, number: int, place: int, part: Part) -> None:
        """Remember part `place` of file `number`, which is named `name`."""
        if part.copy is None and part.size >= _LEAST:
            with (self._folder / name).open("rb") as file:
                prefix = gather(file, part.within(0, _PREFIX))
            self._known.setdefault(prefix, []).append(_Source(name, number, place, part))

    def find(self, name: str, part: Part) -> list[Part] | None:
        """A part of a file as copies of earlier ones; None if any of its bytes are new."""
        if part.size < _LEAST:
            return None
        found = []
        position = 0
        with (self._folder / name).open("rb") as file:
            while position < part.size:
                source = self._source(file, part, position)
                if source is None:
                    return None
                size = min(source.part.size, part.size - position)
                found.append(Part(tuple(part.within(position, size)), copy=(source.number, source.place, 0)))
                position += size
        return found

    def _source(self, file: BinaryIO, part: Part, position: int) -> _Source | None:
        """The longest earlier part that stands at a position of a part."""
        prefix = gather(file, part.within(position, _PREFIX))
        known = sorted(self._known.get(prefix, ()), key=lambda source: -source.part.size)
        return next((source for source in known if self._same(source, file, part, position)), None)

    def _same(self, source: _Source, file: BinaryIO, part: Part, position: int) -> bool:
        size = min(source.part.size, part.size - position)
        with (self._folder / source.name).open("rb") as other:
            return all(
                gather(other, source.part.within(first, length)) == gather(file, part.within(position + first, length))
                for first, length in _blocks(size)
            )


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, size, _BLOCK):
        yield first, min(_BLOCK, size - first)
