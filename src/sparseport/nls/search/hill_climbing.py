"""Hill climbing over sub-networks, as Shears and SQFT do it: from a good guess, one step in one group at a time."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from sparseport.nls.search.budget import Budget
from sparseport.nls.search.candidates import Candidate, Sizes, neighbours
from sparseport.nls.search.objectives import Evaluate, Evaluation, Objective, rank_key


def hill_climb(
    sizes: Sizes,
    evaluate: Evaluate,
    objectives: Sequence[Objective],
    *,
    start: Iterable[Candidate],
    beside: Iterable[Candidate] = (),
    turns: int,
    neighbours_per_turn: int,
    seed: int,
    evaluations: int,
) -> list[Evaluation]:
    """Everything that the climb evaluated, in order; `best_of` is its result.

    The anchor is the best of `start`. In each turn a random few of its neighbours are evaluated, none of them ever
    twice, and the best of these is the next anchor, even if it is worse: this is what leads out of a local maximum. An
    anchor without unvisited neighbours is replaced by the best sub-network that still has some; if none has, the climb
    ends.

    Args:
        sizes: trained sizes of each group.
        evaluate: measures sub-networks.
        objectives: the first decides, the others break ties in their order.
        start: where the climb may begin.
        beside: sub-networks to evaluate as well, which are no place to begin.
        turns: at most so many.
        neighbours_per_turn: at most so many.
        seed: of the choice of neighbours.
        evaluations: at most so many in all.
    """
    dice = random.Random(seed)
    budget = Budget(evaluate, evaluations)
    first = list(start)
    budget.evaluate([*first, *beside])
    anchor = best_of((budget.seen[candidate] for candidate in first if candidate in budget.seen), objectives)
    for _ in range(turns):
        near = _unvisited(anchor, sizes, budget)
        if not near:
            # Best first; the first one with a way on.
            ways = (_unvisited(e, sizes, budget) for e in sorted(budget.all(), key=lambda e: rank_key(e, objectives)))
            near = next(filter(None, ways), [])
        if not near or not budget.left:
            break
        anchor = best_of(budget.evaluate(dice.sample(near, min(neighbours_per_turn, len(near)))), objectives)
    return budget.all()


def best_of(evaluations: Iterable[Evaluation], objectives: Sequence[Objective]) -> Evaluation:
    """The best by the first objective; ties by the next ones, then by the smaller sizes."""
    return min(evaluations, key=lambda evaluation: rank_key(evaluation, objectives))


def _unvisited(anchor: Evaluation, sizes: Sizes, budget: Budget) -> list[Candidate]:
    return [candidate for candidate in neighbours(anchor.candidate, sizes) if candidate not in budget.seen]
