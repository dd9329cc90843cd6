"""The index of the architecture decisions, from their files."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "adr"


def decisions_part() -> str:
    """A line for each decision: number, title, status."""
    lines = ["| | decision | status |", "|---|---|---|"]
    for path in sorted(FOLDER.glob("[0-9]*.md")):
        text = path.read_text(encoding="utf-8")
        title = re.search(r"^# (\d+)\. (.+)$", text, re.M)
        status = re.search(r"^Status: (.+)$", text, re.M)
        if title is None or status is None:
            raise ValueError(f"docs/adr/{path.name} has no title `# N. TITLE` or no line `Status: ...`")
        lines.append(f"| {title[1]} | [{title[2]}]({path.name}) | {status[1]} |")
    return "\n".join(lines)
