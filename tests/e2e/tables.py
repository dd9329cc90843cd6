"""Tables of documents that tests make: a test hands a line over, which is compared with the document or written there.

With SPARSEPORT_WRITE_FORMATS=1 in the environment lines are written (`make formats`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
WRITE = os.environ.get("SPARSEPORT_WRITE_FORMATS") == "1"


def settle_cells(document: Path, table: str, cells: Sequence[str]) -> None:
    """Compare the line whose first cell is `cells[0]` with the one in a document's table, or write it there."""
    lines = document.read_text(encoding="utf-8").splitlines()
    text = row(cells)
    start, end = bounds(lines, table)
    at = [number for number in range(start, end) if lines[number].startswith(row(cells[:1]))]
    name = f"docs/{document.name}"
    if not WRITE:
        assert at, f"{name} has no line for {cells[0]}: `make formats` writes it"
        assert lines[at[0]] == text, f"{name} is out of date (`make formats`): it should have\n{text}"
        return
    kept = [lines[number] for number in range(start, end) if number not in at]
    lines[start:end] = sorted([*kept, text], key=str.casefold)
    document.write_text("\n".join(lines) + "\n", encoding="utf-8")


def cells_of(document: Path, table: str) -> list[tuple[str, ...]]:
    """The cells of every line of a table, headings left out."""
    lines = document.read_text(encoding="utf-8").splitlines()
    start, end = bounds(lines, table)
    return [tuple(cell.strip() for cell in text.strip().strip("|").split("|")) for text in lines[start:end]]


def keep_only(document: Path, table: str, names: set[str]) -> None:
    """Remove the lines whose first cell is not among `names`."""
    lines = document.read_text(encoding="utf-8").splitlines()
    start, end = bounds(lines, table)
    kept = tuple(row((name,)) for name in names)
    lines[start:end] = [text for text in lines[start:end] if text.startswith(kept)]
    document.write_text("\n".join(lines) + "\n", encoding="utf-8")


def bounds(lines: list[str], table: str) -> tuple[int, int]:
    """Where the lines of a table begin and end, headings left out."""
    return lines.index(f"<!-- begin of {table} -->") + 3, lines.index(f"<!-- end of {table} -->")


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
