"""Dots on a logarithmic axis: values that are powers of ten apart, one row each, and the axis below them."""

from __future__ import annotations

from sparseport.model_card.numbers import power_of_ten
from sparseport.report.html import Markup, join, leaf, tag
from sparseport.report.scales import Decades, at


def dot(value: float, axis: Decades, label: str, colour: int = 0, allowed: float | None = None) -> Markup:
    """One row: a line from the axis' start to the dot, hollow where the value is zero.

    Args:
        value: to show.
        axis: shared by the rows of a plot.
        label: what a screen reader says.
        colour: index of the palette.
        allowed: a largest value to mark.
    """
    place = axis.place(value)
    parts: list[Markup] = [leaf("line", class_="axis", x1="0", x2="100%", y1="9", y2="9")]
    for exponent in range(axis.low, axis.high + 1):
        x = at(axis.place(10.0**exponent))
        parts.append(leaf("line", class_="axis", x1=x, x2=x, y1="6", y2="12"))
    if allowed is not None:
        x = at(axis.place(allowed))
        parts.append(leaf("line", class_="limit", x1=x, x2=x, y1="1", y2="17"))
    parts += [
        leaf("line", class_=f"stem c{colour}", x1="0", x2=at(place), y1="9", y2="9"),
        leaf("circle", class_=f"{'hollow' if value <= 0 else 'dot'} c{colour}", cx=at(place), cy="9", r="5.5"),
    ]
    return tag("svg", join(parts), class_="strip dots", width="100%", height="18", role="img", aria_label=label)


def axis_row(axis: Decades, name: str) -> Markup:
    """The names of the ticks, and of the axis."""
    ticks = axis.ticks()
    parts = []
    for exponent in ticks:
        place = axis.place(10.0**exponent)
        anchor = "start" if place < 1 else "end" if place > 99 else "middle"
        parts.append(tag("text", power_of_ten(exponent), x=at(place), y="12", text_anchor=anchor))
    drawn = tag("svg", join(parts), class_="strip ticks", width="100%", height="16", aria_hidden="true")
    return join([drawn, tag("p", name, class_="axis-name", aria_hidden="true")])
