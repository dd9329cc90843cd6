"""The tables of docs/formats.md: one line per format, writer and version, made from what the tests found.

Each test compares its line with the one in the document, so the document cannot say what no test showed. With
SPARSEPORT_WRITE_FORMATS=1 in the environment the lines are written instead (`make formats`).
"""

from __future__ import annotations

import os
from dataclasses import astuple, dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
WRITE = os.environ.get("SPARSEPORT_WRITE_FORMATS") == "1"


@dataclass(frozen=True)
class Line:
    """A format that comes in; every field is plain text without a bar."""

    format: str
    writer: str
    version: str
    read: str
    exact: str
    exported: str
    verified: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.format, self.writer, self.version


@dataclass(frozen=True)
class Refusal:
    """A format that is refused: the message and the way out."""

    format: str
    exit_code: str
    message: str
    way_out: str

    @property
    def key(self) -> tuple[str, ...]:
        return (self.format,)


def settle(line: Line | Refusal) -> None:
    """Compare a line with the document, or write it there."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    text = _row(astuple(line))
    at = [number for number, found in enumerate(lines) if found.startswith(_row(line.key))]
    if not WRITE:
        assert at, f"docs/formats.md has no line for {line.key}: `make formats` writes it"
        assert lines[at[0]] == text, "docs/formats.md is out of date: `make formats` writes it anew"
        return
    for number in reversed(at):
        del lines[number]
    section = "refused" if isinstance(line, Refusal) else "read"
    start, end = (lines.index(f"<!-- {mark} of {section} -->") for mark in ("begin", "end"))
    rows = sorted([*lines[start + 3 : end], text], key=str.casefold)
    lines[start + 3 : end] = rows
    DOCUMENT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def documented(section: str) -> list[tuple[str, ...]]:
    """The cells of every line of a table (`read` or `refused`), headings left out."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    start, end = (lines.index(f"<!-- {mark} of {section} -->") for mark in ("begin", "end"))
    return [tuple(cell.strip() for cell in text.strip().strip("|").split("|")) for text in lines[start + 3 : end]]


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
