"""HTML and SVG as strings: text is escaped unless it is markup that was made here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from sparseport.errors import printable


class Markup(str):
    """HTML or SVG that may go into the page as it is; every other text is escaped by `tag` and `join`."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """A value as text of the page: markup as it is, anything else escaped, control characters as their escapes.

    What turns the direction of writing around is a control character too, so no name can pass for another one.
    """
    if isinstance(value, Markup):
        return value
    text = "\n".join(map(printable, str(value).split("\n")))
    return Markup(html.escape(text, quote=True))


def join(parts: Iterable[object]) -> Markup:
    """Parts one after the other; None is nothing."""
    return Markup("".join(escaped(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element with its end tag.

    Args:
        name: of the element.
        children: markup, or values that are escaped; None is nothing.
        attributes: `class_` is class and `_` is a hyphen; None leaves an attribute out.
    """
    return Markup(f"<{name}{_attributes(attributes)}>{join(children)}</{name}>")


def leaf(name: str, /, **attributes: object) -> Markup:
    """An element without content: a void element of HTML, or an empty one of SVG."""
    return Markup(f"<{name}{_attributes(attributes)}/>")


def table(heads: Sequence[object], rows: Iterable[Sequence[object]], caption: str) -> Markup:
    """A table that scrolls sideways by itself where the page is narrow; its first column names the rows."""
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in heads)))
    body = tag("tbody", *(_row(row) for row in rows))
    whole = tag("table", tag("caption", caption), head, body)
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def details(summary: object, *children: object, open_: bool = False) -> Markup:
    """A part that opens when its summary is chosen, with no script."""
    return tag("details", tag("summary", summary), *children, open="" if open_ else None)


def _row(cells: Sequence[object]) -> Markup:
    first, *rest = cells
    return tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest))


def _attributes(attributes: dict[str, object]) -> str:
    given = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    return "".join(f' {name}="{escaped(value)}"' for name, value in given)
