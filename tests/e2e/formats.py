"""The tables of docs/formats.md: one line per format, made from what the tests found.

A test names its lines beforehand with `shown` or `refused`, and hands each over with `settle`, which compares it with
the one in the document. A test that does not settle exactly the lines it named fails; so does `test_formats.py` where
the document has a line that no test names, or lacks one. With SPARSEPORT_WRITE_FORMATS=1 in the environment the lines
are written instead, and those that no test names are dropped (`make formats`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest

from e2e.tables import DOCS, cells_of, keep_only, settle_cells

DOCUMENT = DOCS / "formats.md"
VERIFIED = "0 differences, logits agree"

Test = Callable[..., None]
# Table -> format -> the test that names it. Filled when a test module is imported, whichever of its tests then run.
_named: dict[str, dict[str, str]] = {"read": {}, "refused": {}}
_settled: set[str] = set()


@dataclass(frozen=True)
class Line:
    """A format that comes in; every field is plain text without a bar."""

    format: str
    writer: str
    version: str
    read: str
    exact: str
    exported: str
    verified: str = VERIFIED


@dataclass(frozen=True)
class Refusal:
    """A format that is refused: the message and the way out."""

    format: str
    exit_code: str
    message: str
    way_out: str


def shown(*formats: str, **cases: Mapping[str, str]) -> Callable[[Test], Test]:
    """Mark a test that settles a `Line` for each of `formats`.

    cases  name of a parameter -> value of the parameter -> format: the test runs for each value, and settles the one
           line that belongs to it
    """
    return _naming("read", formats, cases)


def refused(*formats: str, **cases: Mapping[str, str]) -> Callable[[Test], Test]:
    """Mark a test that settles a `Refusal` for each of `formats`; see `shown`."""
    return _naming("refused", formats, cases)


def settle(line: Line | Refusal) -> None:
    """Compare a line with the document, or write it there."""
    table = "refused" if isinstance(line, Refusal) else "read"
    assert line.format in _named[table], f"name the line {line.format!r} with the mark of its test"
    _settled.add(line.format)
    settle_cells(DOCUMENT, table, astuple(line))


def documented(table: str) -> list[tuple[str, ...]]:
    """The cells of every line of a table (`read` or `refused`), headings left out."""
    return cells_of(DOCUMENT, table)


def named(table: str) -> set[str]:
    """The formats of a table that tests name, in all modules beside this one: also in those that do not run now."""
    for module in sorted(Path(__file__).parent.glob("test_formats*.py")):
        importlib.import_module(f"e2e.{module.stem}")
    return set(_named[table])


def drop_unnamed() -> None:
    """Remove the lines that no test names from the document."""
    for table in _named:
        keep_only(DOCUMENT, table, named(table))


def _naming(table: str, formats: tuple[str, ...], cases: Mapping[str, Mapping[str, str]]) -> Callable[[Test], Test]:
    def mark(test: Test) -> Test:
        # pytest and `named` may import a module twice under two names; the same test may name its lines again.
        who = f"{Path(test.__code__.co_filename).name}::{test.__name__}"
        for name in (*formats, *(name for values in cases.values() for name in values.values())):
            other = _named[table].setdefault(name, who)
            assert other == who, f"{who} and {other} both name the line {name!r}"

        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            expected = {*formats, *(values[kwargs[parameter]] for parameter, values in cases.items())}
            _settled.clear()
            test(*args, **kwargs)
            assert _settled == expected, f"{who} names {sorted(expected)} and settles {sorted(_settled)}"

        marked: Test = run
        for parameter, values in cases.items():
            marked = pytest.mark.parametrize(parameter, sorted(values))(marked)
        return marked

    return mark
