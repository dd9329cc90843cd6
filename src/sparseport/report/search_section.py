"""The section on a search: the front, the named sub-networks, and why one of them was taken."""

from __future__ import annotations

from sparseport.model_card.numbers import count
from sparseport.nls.search.front import SearchResult
from sparseport.nls.search.objectives import ACCURACY, Evaluation, Objective
from sparseport.report.front_plot import axis_name, front_plot, mark, spoken, value_of
from sparseport.report.html import Markup, details, join, table, tag

_NAMES = ("minimal", "heuristic", "maximal")


def search_section(search: tuple[str, SearchResult] | None) -> Markup:
    """A plot for each cost; without a file, how to get one."""
    parts = [tag("h2", "Which sub-network, and why")]
    if search is None:
        how = [
            "No search was given. ",
            tag("code", "sparseport search"),
            " writes ",
            tag("code", "search.json"),
            "; give it with ",
            tag("code", "--search FILE"),
            ".",
        ]
        return join([*parts, tag("p", *how, class_="empty")])
    name, result = search
    up = next((objective for objective in result.objectives if objective.name == ACCURACY), None)
    costs = [objective for objective in result.objectives if objective.name != ACCURACY]
    strategy = str(result.strategy.get("strategy", result.strategy.get("name", "")))
    told = f"{count(len(result.evaluations))} sub-networks were measured"
    told += f" ({strategy})" if strategy else ""
    told += f"; {count(len(result.front))} of them are on the front, where none is better in everything."
    parts.append(tag("p", told, " ", tag("b", "Taken: "), f"{result.reason.rstrip('.')}."))
    if up is not None:
        for cost in costs:
            parts.append(tag("figure", front_plot(result, cost, up), _legend(result, cost, up)))
    if up is None or not costs:
        parts.append(tag("p", "The search had one objective, so there is no front to draw.", class_="empty"))
    parts.append(details("The front as a table", _table(result, name)))
    return join(parts)


def _legend(result: SearchResult, cost: Objective, up: Objective) -> Markup:
    items = [
        tag("li", mark("evaluated"), tag("span", "measured")),
        tag("li", mark("front"), tag("span", "Pareto front")),
    ]
    for name in _NAMES:
        if name in result.seeds:
            items.append(_item(name, name, result.of(result.seeds[name]), cost, up))
    if result.chosen is not None:
        items.append(_item("chosen", "taken", result.of(result.chosen), cost, up))
    if "heuristic" in result.seeds:
        items.append(
            tag("li", tag("span", "", class_="dash-key", aria_hidden="true"), tag("span", "accuracy of the heuristic"))
        )
    return tag("ul", *items, class_="legend keys")


def _item(sign: str, name: str, evaluation: Evaluation, cost: Objective, up: Objective) -> Markup:
    return tag("li", mark(sign), tag("span", tag("b", name), f": {spoken(up, evaluation)}, {spoken(cost, evaluation)}"))


def _table(result: SearchResult, name: str) -> Markup:
    rows = [
        [
            *(value_of(o, result.of(one).values[o.name]) for o in result.objectives),
            _role(result, one),
            ", ".join(map(str, one)),
        ]
        for one in result.front
    ]
    rows += [
        [
            *(value_of(o, result.of(one).values[o.name]) for o in result.objectives),
            _role(result, one),
            ", ".join(map(str, one)),
        ]
        for seed, one in sorted(result.seeds.items())
        if one not in result.front
    ]
    heads = [*(axis_name(objective) for objective in result.objectives), "what it is", "sizes of its groups"]
    return table(
        heads,
        rows,
        f"Sub-networks on the front, the most accurate first, then the named ones that are not on it; {name}",
    )


def _role(result: SearchResult, candidate: tuple[int, ...]) -> str:
    roles = [seed for seed, one in sorted(result.seeds.items()) if one == candidate]
    return ", ".join(roles + (["taken"] if candidate == result.chosen else []))
