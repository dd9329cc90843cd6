"""A picture of a search: cost against accuracy, every sub-network, the Pareto front, and where the named ones lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseport.errors import UsageError
from sparseport.extras import require_packages
from sparseport.nls.search.front import SearchResult
from sparseport.nls.search.objectives import Evaluation, Objective, pareto_front
from sparseport.search_recipe import QUALITIES

# Okabe and Ito's palette, which colour-blind readers can tell apart; the markers differ too.
_BLUE, _ORANGE, _GREEN, _PURPLE, _RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
_MARKS = {"minimal": ("v", _ORANGE), "heuristic": ("D", _GREEN), "maximal": ("^", _PURPLE)}
_OFFSETS = {"minimal": (8, -14), "heuristic": (8, 8), "maximal": (8, -14)}
_NAMES = {"macs": "MACs"}
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "sparseport",  # ids of the SVG's parts; random without it
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(result: SearchResult, paths: Sequence[Path], *, cost: str | None = None) -> None:
    """Draw the result into files; the same result gives the same bytes (with the same matplotlib).

    The dashed line is the accuracy of the heuristic sub-network, as in SQFT's figure of its search; in a search for a
    draft its acceptance or predicted speed-up.

    Args:
        result: what to draw.
        paths: files to write, .svg or .png.
        cost: objective of the horizontal axis; None: the first one beside the accuracy.

    Raises:
        UsageError: the search had no such objective, or a file name ends in something else.
        EnvironmentProblem: matplotlib is not installed.
    """
    costs = [objective for objective in result.objectives if objective.name not in QUALITIES]
    accuracy = next((objective for objective in result.objectives if objective.name in QUALITIES), None)
    across = next((objective for objective in costs if cost in (None, objective.name)), None)
    if across is None or accuracy is None:
        raise UsageError(
            "the picture needs the accuracy and a cost",
            expected=" or ".join(objective.name for objective in costs) or "a search with two objectives",
            found=cost or ", ".join(objective.name for objective in result.objectives),
        )
    for path in paths:
        if path.suffix not in (".svg", ".png"):
            raise UsageError("a picture is .svg or .png", found=path.name)
    require_packages(["search"])
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # nobody's style file has a say
        matplotlib.rcParams.update(_STYLE)
        figure = _figure(result, across, accuracy)
        for path in paths:
            partial = path.with_name(f".{path.name}.partial")
            metadata = {"Date": None} if path.suffix == ".svg" else {}
            try:
                figure.savefig(partial, format=path.suffix[1:], dpi=150, metadata=metadata)
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise


def _figure(result: SearchResult, across: Objective, up: Objective) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    def point(evaluation: Evaluation) -> tuple[float, float]:
        return evaluation.values[across.name], evaluation.values[up.name]

    figure = Figure(figsize=(6.4, 4.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("white")
    axes.grid(True, color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    across_all, up_all = zip(*map(point, result.evaluations), strict=True)
    axes.scatter(across_all, up_all, s=18, color=_BLUE, alpha=0.3, linewidths=0, label="evaluated")
    # The front of these two objectives, which is a line; with more objectives the result's own front is not.
    front = sorted(point(evaluation) for evaluation in pareto_front(result.evaluations, (up, across)))
    axes.plot(*zip(*front, strict=True), color=_BLUE, linewidth=1.6, marker="o", markersize=4, label="Pareto front")
    for name, (marker, colour) in _MARKS.items():
        if name not in result.seeds:
            continue
        x, y = point(result.of(result.seeds[name]))
        axes.plot(x, y, marker=marker, color=colour, markersize=9, markeredgecolor="black", linestyle="none", zorder=4)
        axes.annotate(
            name,
            (x, y),
            xytext=_OFFSETS[name],
            textcoords="offset points",
            ha="right" if _OFFSETS[name][0] < 0 else "left",
            zorder=5,
        )
        if name == "heuristic":
            axes.axhline(y, color=_GREEN, linestyle="--", linewidth=1.0, zorder=1, label=f"{up.name} of the heuristic")
    if result.chosen is not None:
        axes.plot(
            *point(result.of(result.chosen)),
            marker="o",
            markersize=14,
            markerfacecolor="none",
            markeredgecolor=_RED,
            markeredgewidth=1.8,
            linestyle="none",
            zorder=6,
            label="chosen",
        )
    axes.set_xlabel(_NAMES.get(across.name, across.name))
    axes.set_ylabel(_NAMES.get(up.name, up.name))
    axes.xaxis.set_major_formatter(EngFormatter(unit=across.unit or ""))
    axes.margins(0.1)
    axes.legend(frameon=False, fontsize=9, loc="best", labelcolor="black")
    return figure
