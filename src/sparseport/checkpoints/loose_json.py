"""JSON as NNCF writes and reads it by hand: with comments and trailing commas.

Only the text is mended here; it is then read by the strict reader, so duplicate keys and NaN stay refused.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)"""
    r"""|(?P<comment>//[^\r\n]*|/\*.*?\*/)"""
    r"""|(?P<string>"[^"\\]*(?:\\.[^"\\]*)*")"""
    r"""|(?P<endless>"|/\*)"""
    r"""|(?P<comma>,)"""
    r"""|(?P<other>[^\s"/,\[\]{}:]+|.)""",
    re.DOTALL,
)
_NOT_LINE_END = re.compile(r"[^\r\n]")


def strict_text(text: str) -> str:
    """The text with comments (`//`, `/* */`) and commas before a closing bracket turned into spaces.

    Line and column of everything else stay the same, so the strict reader's messages point into the file. What is not
    JSON for another reason is left for that reader to refuse.
    """
    parts: list[str] = []
    trailing: int | None = None  # place of a comma that goes if a bracket closes next
    before = "["
    for match in _TOKEN.finditer(text):
        kind, piece = match.lastgroup, match.group()
        if kind == "endless":
            # A string or comment that never ends: looking on would read the rest once per quote.
            parts.append(text[match.start() :])
            break
        if kind == "comment":
            piece = _NOT_LINE_END.sub(" ", piece)
        elif kind == "comma":
            # Only a value can have a comma after it: [,] is no JSON in any dialect.
            trailing = None if before in "[{:" else len(parts)
        elif kind != "space":
            if trailing is not None and piece in "]}":
                parts[trailing] = " "
            trailing, before = None, piece[-1]
        parts.append(piece)
    return "".join(parts)
