"""Reading the lines of a data set, and splitting them so that no question is on two sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sparseport.errors import BadInput

Item = TypeVar("Item")

# Every fifth question of the training file, and not more than these, is for choosing between models.
VALIDATION_SHARE = 5
VALIDATION_ITEMS = 500


@dataclass(frozen=True)
class Line:
    """One object of a JSONL file, which names itself when something is wrong with it.

    fields    the object
    where     file and line number
    expected  what a line of this file looks like
    """

    fields: dict[str, Any]
    where: str
    expected: str

    def wrong(self, found: object) -> BadInput:
        """The error for a line that is not of the file's form."""
        return BadInput("not a task item", where=self.where, found=repr(found)[:80], expected=self.expected)

    def text(self, *names: str, numbers: bool = False) -> str:
        """The first of these fields that is there: a text, or a number as text if `numbers`.

        Raises:
            BadInput: none is there, or it is no text.
        """
        for name in names:
            if name in self.fields:
                value = self.fields[name]
                if numbers and isinstance(value, int | float) and not isinstance(value, bool):
                    return str(value)
                if not isinstance(value, str):
                    raise self.wrong({name: value})
                return value
        raise self.wrong(sorted(self.fields))

    def one_of(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """A field that has one of a few values.

        Raises:
            BadInput: it has another, or it is not there and there is no default.
        """
        value = self.fields.get(name, default)
        if value not in allowed:
            raise self.wrong({name: value})
        return str(value)


def read_lines(path: Path, expected: str) -> Iterator[Line]:
    """The lines of a JSONL file, empty ones left out.

    Raises:
        BadInput: the file is not there, is no UTF-8, or a line is no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("cannot read a data file", where=path, found=repr(error), code="E_MISSING") from error
    # Not splitlines(): a JSON string may hold U+2028, which is no end of a line here.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise BadInput("not a task item", where=where, found=repr(error), expected=expected) from error
        if not isinstance(fields, dict):
            raise BadInput("not a task item", where=where, found=type(fields).__name__, expected=expected)
        yield Line(fields, where, expected)


def split_off_validation(
    train: Sequence[Item], test: Sequence[Item], question: Callable[[Item], str]
) -> tuple[list[Item], list[Item], int]:
    """Training items without the questions of the test, in two parts that share no question either.

    Questions are compared without regard to case and white space. Which of them go to validation follows the SHA-256
    of the question, so it depends on no random generator and on no order of the file.

    Args:
        train: items of the training file.
        test: items of the test file; none of them is dropped.
        question: the text that makes two items the same.

    Returns:
        Training items in the order of the file, validation items in the order of their hashes, and how many items were
        dropped because the test asks the same.
    """
    asked = {_key(question(item)) for item in test}
    clean = [item for item in train if _key(question(item)) not in asked]
    order = sorted({_key(question(item)) for item in clean})
    chosen = set(order[: min(VALIDATION_ITEMS, len(order) // VALIDATION_SHARE)])
    validation = sorted((item for item in clean if _key(question(item)) in chosen), key=lambda x: _key(question(x)))
    return [item for item in clean if _key(question(item)) not in chosen], validation, len(train) - len(clean)


def _key(question: str) -> bytes:
    return hashlib.sha256(" ".join(question.split()).casefold().encode("utf-8")).digest()
