"""Text from files as Markdown that shows it and does nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sparseport.errors import printable

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$@-])")


def plain(text: object) -> str:
    """Text on one line with everything escaped that Markdown or HTML would act on."""
    return _SPECIAL.sub(r"\\\1", printable(str(text))).replace("\\<", "&lt;").replace("\\&", "&amp;")


def code(text: object) -> str:
    """Text in a code span, also inside a table; a backtick in it becomes an apostrophe."""
    shown = printable(str(text)).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`" if shown.strip() else "` `"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; nothing without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *lines])


def block(language: str, text: str) -> str:
    """A block of code, fenced by more backticks than stand in it anywhere."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
