"""Which page has a generated part, and what makes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tools.pages.api import api_part
from tools.pages.cli import cli_part
from tools.pages.decisions import decisions_part
from tools.pages.error_codes import errors_part

DOCS = Path(__file__).resolve().parents[2] / "docs"
PARTS: dict[str, Callable[[], str]] = {
    "api.md": api_part,
    "cli.md": cli_part,
    "errors.md": errors_part,
    "adr/README.md": decisions_part,
}
"""Page under docs/ -> what writes the lines between its marks."""

BEGIN, END = "<!-- begin of generated part: make pages -->", "<!-- end of generated part -->"


def filled(text: str, part: str, page: str) -> str:
    """A page with another generated part.

    Raises:
        ValueError: the page does not have both marks once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"docs/{page}: the marks of the generated part are not there once each")
    return re.sub(
        f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{part.strip()}\n{END}", text, flags=re.S
    )
