"""What stands in the Markdown files of the repository: code blocks, links, headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
_FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)(?P=fence) *$", re.M | re.S
)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.M)


@dataclass(frozen=True)
class Block:
    """A code block: where it is, its language (empty for indented ones), its text."""

    path: Path
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.path.relative_to(REPO)}:{self.line}"


def documents() -> list[Path]:
    """Every Markdown file that a reader meets."""
    return sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")])


def blocks(path: Path) -> list[Block]:
    """Fenced and indented code blocks of a file."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(path, line, match["language"], match["code"]))
    return found + _indented(path, _FENCE.sub(_blank, text))


def _indented(path: Path, text: str) -> list[Block]:
    """Blocks of lines that begin with four spaces, after an empty line."""
    found, lines, before = [], text.splitlines(), ""
    start = None
    for number, line in enumerate([*lines, ""]):
        inside = line.startswith("    ") if start is None else line.startswith("    ") or not line.strip()
        if start is None and inside and not before.strip():
            start = number
        elif start is not None and not inside:
            found.append(Block(path, start + 1, "", "\n".join(lines[start:number])))
            start = None
        before = line
    return found + ([Block(path, start + 1, "", "\n".join(lines[start:]))] if start is not None else [])


def _blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


def prose(path: Path) -> str:
    """A file without its code blocks; lines keep their numbers."""
    text = _FENCE.sub(_blank, path.read_text(encoding="utf-8"))
    return "\n".join("" if line.startswith("    ") else line for line in text.splitlines())


def spans(path: Path) -> list[str]:
    """Inline code."""
    return _SPAN.findall(prose(path))


def links(path: Path) -> list[str]:
    """Targets of links and images."""
    return _LINK.findall(_SPAN.sub("", prose(path)))


def anchors(path: Path) -> set[str]:
    """Names that GitHub gives to headings."""
    found: dict[str, int] = {}
    names = set()
    for heading in _HEADING.findall(prose(path)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names
