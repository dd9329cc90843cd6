"""Values of a JSON file, each checked when it is taken: what is missing or of another kind is refused by its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import read_json
from sparseport.errors import BadInput

_LIMIT = 64 << 20
_LONGEST = 4000


class Fields:
    """A mapping of a JSON file; `where` names it in messages."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise _wrong(where, "a mapping", data)
        self.data: Mapping[str, Any] = data
        self.where = where

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.data.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """A text; `default` where the key is missing or null.

        Raises:
            BadInput: it is no text, is longer than any name, or is missing and there is no default.
        """
        value = self._value(key, default)
        if not isinstance(value, str) or len(value) > _LONGEST:
            raise _wrong(f"{self.where}, {key}", "a text", value)
        return value

    def number(self, key: str) -> float:
        """A number that is not below 0, also as a decimal text; raises as `text`."""
        value = self._value(key, None)
        try:
            found = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else -1.0
        except ValueError:
            found = -1.0
        if not 0 <= found < float("inf"):
            raise _wrong(f"{self.where}, {key}", "a number from 0", value)
        return found

    def optional(self, key: str) -> float | None:
        """A number, or None where the key is missing or null; raises as `number`."""
        return self.number(key) if self.has(key) else None

    def count(self, key: str) -> int:
        """A whole number from 0; raises as `text`."""
        value = self._value(key, None)
        if type(value) is not int or value < 0:
            raise _wrong(f"{self.where}, {key}", "a whole number from 0", value)
        return value

    def part(self, key: str) -> Fields:
        """A mapping inside; raises as `text`."""
        return Fields(self._value(key, None), f"{self.where}, {key}")

    def maybe(self, key: str) -> Fields | None:
        """A mapping inside, or None where the key is missing or null; raises as `text`."""
        return self.part(key) if self.has(key) else None

    def parts(self, key: str, *, required: bool = False) -> Iterator[Fields]:
        """The mappings of a list; none where the key is missing; raises as `text`."""
        value = self._value(key, None if required else [])
        if not isinstance(value, list):
            raise _wrong(f"{self.where}, {key}", "a list", value)
        return (Fields(item, f"{self.where}, {key}[{number}]") for number, item in enumerate(value))

    def texts(self, key: str) -> dict[str, str]:
        """A mapping of plain values, as texts; empty where the key is missing.

        Raises:
            BadInput: a value is a list or a mapping.
        """
        found = self.maybe(key)
        values = {} if found is None else dict(found.data)
        for name, value in values.items():
            if isinstance(value, list | dict):
                raise _wrong(f"{self.where}, {key}, {name}", "a plain value", value)
        return {name: str(value) for name, value in values.items() if value is not None}

    def _value(self, key: str, default: object) -> Any:
        value = self.data.get(key)
        return default if value is None else value


def read_fields(path: Path, what: str) -> Fields:
    """A JSON file; raises as `read_json`. Messages name the file as the user gave it."""
    return Fields(read_json(path, limit=_LIMIT, what=what), str(path))


def _wrong(where: str, expected: str, found: object) -> BadInput:
    shown = "nothing" if found is None else repr(found)[:80]
    return BadInput("a value of the file is missing or of another kind", where=where, expected=expected, found=shown)
