"""What every page has to be: well-formed, with every tag closed, and loading nothing from anywhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}
_URL = re.compile(r"url\(\s*['\"]?([^'\")]*)", re.I)
_LOADED = ("src", "srcset", "href", "xlink:href", "data", "action", "poster", "background", "formaction")


class Checked(HTMLParser):
    """Parses a page strictly; `text` is what a reader sees, `ids` and `links` what leads where."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.pieces: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.problems: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._take(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._take(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes something else")

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.problems += [f"the style sheet loads {found}" for found in _URL.findall(data)]
            self.problems += ["the style sheet imports another"] if "@import" in data else []
        else:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def _take(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if len({name for name, _ in attrs}) != len(attrs):
            self.problems.append(f"<{tag}> at {self.getpos()} has an attribute twice")
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")
            if name.startswith("on"):
                self.problems.append(f"<{tag} {name}> runs a script")
            if name in _LOADED:
                if (value or "").startswith("#"):
                    self.links.append((value or "")[1:])
                elif value != "data:,":
                    self.problems.append(f"<{tag} {name}={value!r}> loads something")
            if name == "style" and "url(" in (value or ""):
                self.problems.append(f"<{tag} style={value!r}> loads something")


def checked(page: str) -> Checked:
    """Parse a page and require all of it.

    Raises:
        AssertionError: lists what is wrong.
    """
    parser = Checked()
    parser.feed(page)
    parser.close()
    problems = parser.problems + [f"<{tag}> is not closed" for tag in parser.open]
    problems += [f"id {name!r} twice" for name in set(parser.ids) if parser.ids.count(name) > 1]
    problems += [f"#{name} leads nowhere" for name in parser.links if name not in parser.ids]
    forbidden = {"script", "iframe", "object", "embed", "img", "form", "audio", "video", "base"} & set(parser.seen)
    problems += [f"<{tag}> is there" for tag in sorted(forbidden)]
    assert problems == []
    return parser
