"""Reading the lines of a data set, and splitting them so that no question is on two sides."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from sparseport.errors import BadInput

Item = TypeVar("Item")

# Every fifth question of the training file, and not more than these, is for choosing between models.
VALIDATION_SHARE = 5
VALIDATION_ITEMS = 500
_THOUSANDS = re.compile(r"(?<=\d)\s?,\s?(?=\d{3}(?!\d))")


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

    Questions are the same if their `question_key` is. Which of them go to validation follows that key, so it depends
    on no random generator and on no order of the file.

    Args:
        train: items of the training file.
        test: items of the test file; none of them is dropped.
        question: the text that makes two items the same.

    Returns:
        Training items in the order of the file, validation items in the order of their hashes, and how many items were
        dropped because the test asks the same.
    """
    asked = {question_key(question(item)) for item in test}
    keyed = [(question_key(question(item)), item) for item in train]
    clean = [(key, item) for key, item in keyed if key not in asked]
    order = sorted({key for key, _ in clean})
    chosen = set(order[: min(VALIDATION_ITEMS, len(order) // VALIDATION_SHARE)])
    validation = sorted((pair for pair in clean if pair[0] in chosen), key=lambda pair: pair[0])
    kept = [item for key, item in clean if key not in chosen]
    return kept, [item for _, item in validation], len(train) - len(clean)


def question_key(question: str) -> bytes:
    """SHA-256 of what makes a question this one: its letters and digits, without regard to case.

    Data sets spell one question in several ways: with blanks before full stops or without, with other quotes. What
    stands between two digits counts as well, but for blanks, so that 1.5 is not 15, nor 2+3 the same as 2-3; commas of
    thousands do not count.
    """
    text = _THOUSANDS.sub("", unicodedata.normalize("NFKC", question).casefold())
    parts = ["".join(run) for _, run in groupby(text, _spells)]
    kept = ""
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        if _spells(part[0]):
            kept += part
        elif kept[-1:].isdigit() and after[:1].isdigit():
            kept += "".join(part.split()) or " "
    # A question without a single letter or digit is known by its signs.
    return hashlib.sha256((kept or " ".join(text.split())).encode("utf-8")).digest()


def _spells(character: str) -> bool:
    """Whether it is a letter, a digit, or a mark on one (the vowels of Devanagari are marks)."""
    return unicodedata.category(character)[0] in "LNM"
