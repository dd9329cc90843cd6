"""Text in Markdown tables."""

from __future__ import annotations


def cell(text: str) -> str:
    """Text for one cell: on one line, nothing in it taken for a column or a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
