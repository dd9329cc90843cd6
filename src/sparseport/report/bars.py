"""A bar with its range: the median as the bar's end, whiskers from the least to the largest value."""

from __future__ import annotations

from sparseport.report.bench_file import Summary
from sparseport.report.html import Markup, join, leaf, tag
from sparseport.report.scales import Linear, at


def bar(summary: Summary, top: float, label: str, colour: int = 0, limit: float | None = None) -> Markup:
    """One bar, as wide as its place.

    Args:
        summary: what was measured.
        top: value at the right end.
        label: what a screen reader says.
        colour: index of the palette.
        limit: value up to which the bar could go, marked at its end; nothing is drawn for one beyond the right end.
    """
    scale = Linear(0.0, top)
    drawn = limit is not None and limit <= top
    end, least, largest = (scale.place(value) for value in (summary.median, summary.least, summary.largest))
    room = "100%" if limit is None or not drawn else at(scale.place(limit))
    parts: list[Markup] = [
        leaf("rect", class_="track", x="0", y="3", width=room, height="12", rx="3"),
        leaf("rect", class_=f"bar c{colour}", x="0", y="3", width=at(end), height="12", rx="3"),
    ]
    if limit is not None and drawn:
        parts.append(
            leaf("line", class_="limit", x1=at(scale.place(limit)), x2=at(scale.place(limit)), y1="0", y2="18")
        )
    parts += [
        leaf("line", class_="whisker", x1=at(least), x2=at(largest), y1="9", y2="9"),
        leaf("line", class_="whisker", x1=at(least), x2=at(least), y1="5", y2="13"),
        leaf("line", class_="whisker", x1=at(largest), x2=at(largest), y1="5", y2="13"),
    ]
    return tag("svg", join(parts), class_="strip", width="100%", height="18", role="img", aria_label=label)


def share_bar(share: float, label: str, colour: int = 0) -> Markup:
    """A bar from nothing to all for a share of 1."""
    parts = [
        leaf("rect", class_="track", x="0", y="2", width="100%", height="8", rx="3"),
        leaf("rect", class_=f"bar c{colour}", x="0", y="2", width=at(100 * share), height="8", rx="3"),
    ]
    return tag("svg", join(parts), class_="strip", width="100%", height="12", role="img", aria_label=label)
