"""What sub-networks are compared by: objectives, measured values, Pareto dominance, and the choice of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from sparseport.errors import BadInput
from sparseport.nls.search.candidates import Candidate

ACCURACY = "accuracy"
# Sums of decimal fractions such as 0.9 - 0.01 miss their value by a unit in the last place.
_SLACK = 1e-12


@dataclass(frozen=True)
class Objective:
    """A measured value and which end of it is good.

    unit  what one of it is, for tables and axes; None for a plain number
    """

    name: str
    direction: Literal["max", "min"]
    unit: str | None = None

    def cost(self, value: float) -> float:
        """The value as something to make small."""
        return -value if self.direction == "max" else value


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective(ACCURACY, "max"),
        Objective("acceptance", "max"),
        Objective("speculation", "max"),
        Objective("macs", "min", "per token"),
        Objective("parameters", "min"),
        Objective("latency", "min", "s"),
    )
}
"""What a search recipe can ask for; the recipe's names are these. Accuracy and acceptance are shares, 0 to 1."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured for one sub-network.

    candidate  its sizes
    values     objective -> measured value, in the objective's own direction and unit
    seconds    time that measuring took; two evaluations that differ in it only are equal
    """

    candidate: Candidate
    values: dict[str, float]
    seconds: float = field(default=0.0, compare=False)


Evaluate: TypeAlias = Callable[[Sequence[Candidate]], list[Evaluation]]
"""Measures sub-networks; the answers stand in the order of the question."""


def check_values(values: Mapping[str, object], objectives: Sequence[Objective], where: str) -> dict[str, float]:
    """The measured values as floats, in the order of the objectives.

    Raises:
        BadInput: E_EVALUATION for a value that is missing, unknown, no number or not finite.
    """
    names = [objective.name for objective in objectives]
    if set(values) != set(names):
        raise BadInput(
            "an evaluation has other values than the objectives",
            where=where,
            expected=", ".join(names),
            found=", ".join(map(str, values)) or "none",
            code="E_EVALUATION",
        )
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadInput(
                f"the measured {name} is not a finite number",
                where=where,
                found=repr(value)[:40],
                fix="look at the evaluator; a search cannot rank this",
                code="E_EVALUATION",
            )
    return {name: float(values[name]) for name in names}  # type: ignore[arg-type]


def costs(evaluation: Evaluation, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """One number per objective, each to be made small."""
    return tuple(objective.cost(evaluation.values[objective.name]) for objective in objectives)


def rank_key(evaluation: Evaluation, objectives: Sequence[Objective]) -> tuple[tuple[float, ...], Candidate]:
    """Sorts the best first: by the first objective, ties by the next ones, then by the smaller sizes."""
    return costs(evaluation, objectives), evaluation.candidate


def dominates(left: Evaluation, right: Evaluation, objectives: Sequence[Objective]) -> bool:
    """Whether `left` is nowhere worse than `right` and somewhere better (Pareto dominance)."""
    a, b = costs(left, objectives), costs(right, objectives)
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def pareto_front(evaluations: Iterable[Evaluation], objectives: Sequence[Objective]) -> list[Evaluation]:
    """The evaluations that none other dominates, best first objective first; equal ones are all kept."""
    ordered = sorted(evaluations, key=lambda evaluation: rank_key(evaluation, objectives))
    front: list[Evaluation] = []
    for evaluation in ordered:
        # Whatever dominates an evaluation comes before it in this order, and so does one of the front that does.
        if not any(dominates(kept, evaluation, objectives) for kept in front):
            front.append(evaluation)
    return front


def hypervolume(
    evaluations: Iterable[Evaluation], objectives: Sequence[Objective], reference: Sequence[float]
) -> float:
    """Area that the front of two objectives dominates, up to a reference point.

    reference  a value per objective, in its own direction and unit; what is worse than it in one of the two adds
               nothing

    Raises:
        BadInput: not two objectives.
    """
    if len(objectives) != 2 or len(reference) != 2:
        raise BadInput("the hypervolume is defined here for two objectives", found=len(objectives))
    right, top = (objective.cost(value) for objective, value in zip(objectives, reference, strict=True))
    area = 0.0
    for x, y in sorted(costs(evaluation, objectives) for evaluation in evaluations):
        if x < right and y < top:
            area += (right - x) * (top - y)
            top = y
    return area


def cheapest_within(
    evaluations: Iterable[Evaluation], objectives: Sequence[Objective], reference: float, delta: float
) -> Evaluation | None:
    """The cheapest sub-network whose accuracy is at least `reference` - `delta` (LoNAS: ref_acc and acc_delta).

    Accuracy stands for the first objective, which a search for a draft has another one in the place of. Cheap is the
    next objective, ties by those after it, then by the higher accuracy, then by the smaller sizes. None if no
    sub-network is accurate enough.
    """
    quality, *prices = objectives
    accurate = [e for e in evaluations if e.values[quality.name] >= reference - delta - _SLACK]
    order = [*prices, quality]
    return min(accurate, key=lambda evaluation: rank_key(evaluation, order), default=None)
