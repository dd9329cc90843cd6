"""The picture of a search: every sub-network by its cost and its accuracy, the Pareto front, and the named ones."""

from __future__ import annotations

from itertools import pairwise

from sparseport.model_card.numbers import figure, percent
from sparseport.nls.search.front import SearchResult
from sparseport.nls.search.objectives import ACCURACY, Evaluation, Objective, pareto_front
from sparseport.report.html import Markup, join, leaf, tag
from sparseport.report.scales import Linear, around, at

MARKS = {
    "minimal": "M0 6L6 -5H-6Z",
    "heuristic": "M0 -7L7 0L0 7L-7 0Z",
    "maximal": "M0 -6L6 5H-6Z",
}
"""Name of a sub-network -> path of its mark, around its own middle."""

_NAMES = {"macs": "MACs"}
_SECONDS = "s"


def front_plot(result: SearchResult, across: Objective, up: Objective) -> Markup:
    """The plot of two objectives; its box leaves room for the axes by its padding (see page.css)."""
    x, y = (around(e.values[objective.name] for e in result.evaluations) for objective in (across, up))

    def place(evaluation: Evaluation) -> tuple[str, str]:
        return at(x.place(evaluation.values[across.name])), at(100 - y.place(evaluation.values[up.name]))

    parts = [_grid(x, y, across, up)]
    heuristic = result.seeds.get("heuristic")
    if heuristic is not None:
        _, level = place(result.of(heuristic))
        parts.append(leaf("line", class_="heuristic-line", x1="0", x2="100%", y1=level, y2=level))
    for evaluation in result.evaluations:
        cx, cy = place(evaluation)
        name = tag("title", f"{spoken(up, evaluation)}, {spoken(across, evaluation)}")
        parts.append(tag("circle", name, class_="evaluated", cx=cx, cy=cy, r="4"))
    front = sorted(pareto_front(result.evaluations, (up, across)), key=lambda e: e.values[across.name])
    for one, other in pairwise(front):
        (x1, y1), (x2, y2) = place(one), place(other)
        parts.append(leaf("line", class_="front-line", x1=x1, x2=x2, y1=y1, y2=y2))
    for evaluation in front:
        cx, cy = place(evaluation)
        parts.append(leaf("circle", class_="on-front", cx=cx, cy=cy, r="4.5"))
    for seed, path in MARKS.items():
        if seed in result.seeds:
            cx, cy = place(result.of(result.seeds[seed]))
            parts.append(tag("svg", leaf("path", class_=f"mark {seed}", d=path), x=cx, y=cy, overflow="visible"))
    if result.chosen is not None:
        cx, cy = place(result.of(result.chosen))
        parts.append(leaf("circle", class_="chosen-ring", cx=cx, cy=cy, r="11"))
    label = (
        f"{len(result.evaluations)} sub-networks by {axis_name(across)} and {axis_name(up)}; {len(front)} on the front"
    )
    return tag("svg", join(parts), class_="front", width="100%", height="380", role="img", aria_label=label)


def mark(name: str) -> Markup:
    """A mark for the legend."""
    if name == "chosen":
        inside = leaf("circle", class_="chosen-ring", cx="11", cy="11", r="8")
    elif name == "front":
        line = leaf("line", class_="front-line", x1="1", x2="21", y1="11", y2="11")
        inside = join([line, leaf("circle", class_="on-front", cx="11", cy="11", r="4.5")])
    elif name == "evaluated":
        inside = leaf("circle", class_="evaluated", cx="11", cy="11", r="4")
    else:
        inside = tag("svg", leaf("path", class_=f"mark {name}", d=MARKS[name]), x="11", y="11", overflow="visible")
    return tag("svg", inside, class_="key", width="22", height="22", aria_hidden="true")


def axis_name(objective: Objective) -> str:
    """What an axis is called, with its unit; percent and milliseconds stand with the values."""
    name = _NAMES.get(objective.name, objective.name)
    return name if objective.unit in (None, _SECONDS) else f"{name} ({objective.unit})"


def spoken(objective: Objective, evaluation: Evaluation) -> str:
    """`accuracy 61.5%`, `MACs 98.1 M`."""
    value = evaluation.values[objective.name]
    return f"{_NAMES.get(objective.name, objective.name)} {value_of(objective, value)}"


def value_of(objective: Objective, value: float) -> str:
    """A value with what belongs to it: accuracy in percent, seconds as milliseconds, counts with engineers' letters."""
    number, unit = _scaled(objective, value)
    return percent(value) if unit == "%" else f"{figure(number)}{unit}"


def _scaled(objective: Objective, value: float) -> tuple[float, str]:
    if objective.name == ACCURACY and 0 <= value <= 1:
        return value * 100, "%"
    if objective.unit == _SECONDS:
        return (value * 1e3, " ms") if abs(value) < 1 else (value, " s")
    for factor, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return value / factor, letter
    return value, ""


def _grid(x: Linear, y: Linear, across: Objective, up: Objective) -> Markup:
    parts = []
    for value in y.ticks():
        level = at(100 - y.place(value))
        parts.append(leaf("line", class_="grid", x1="0", x2="100%", y1=level, y2=level))
        parts.append(tag("text", _tick(up, value), x="0", y=level, dx="-8", dy="4", text_anchor="end"))
    for value in x.ticks(6):
        parts.append(tag("text", _tick(across, value), x=at(x.place(value)), y="100%", dy="20", text_anchor="middle"))
    parts.append(leaf("line", class_="frame", x1="0", x2="100%", y1="100%", y2="100%"))
    parts.append(tag("text", axis_name(across), class_="name", x="100%", y="100%", dy="40", text_anchor="end"))
    parts.append(tag("text", axis_name(up), class_="name", x="0", y="0", dx="-8", dy="-10", text_anchor="start"))
    return join(parts)


def _tick(objective: Objective, value: float) -> str:
    number, unit = _scaled(objective, value)
    return f"{number:.4g}{unit}"
