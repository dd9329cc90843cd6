"""NSGA-II and R-NSGA-II over sub-networks (Deb et al. 2002; Deb and Sundar 2006), by pymoo.

A variable is the position of a size in its group, a whole number: crossover and mutation work on reals and round.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparseport.errors import UsageError
from sparseport.extras import require_packages
from sparseport.nls.search.budget import Budget
from sparseport.nls.search.candidates import Candidate, Sizes, from_indices, random_candidates, to_indices
from sparseport.nls.search.objectives import Evaluate, Evaluation, Objective, costs

# Distribution indices of simulated binary crossover and polynomial mutation. pymoo's defaults, 15 and 20, are meant
# for reals: between the few positions of a group, steps that small nearly always round to nothing.
_ETA = 3.0
_CROSSOVER_PROBABILITY = 0.9


@dataclass(frozen=True)
class Aspiration:
    """What R-NSGA-II steers towards.

    points   a value per objective each, in its own direction and unit
    epsilon  sub-networks closer than this crowd each other out; in ranges of the objectives
    weights  of the objectives in the distance to a point, None: equal
    """

    points: tuple[tuple[float, ...], ...]
    epsilon: float = 0.001
    weights: tuple[float, ...] | None = None


def evolve(
    sizes: Sizes,
    evaluate: Evaluate,
    objectives: Sequence[Objective],
    *,
    seeds: Sequence[Candidate],
    population: int,
    seed: int,
    evaluations: int,
    aspiration: Aspiration | None = None,
) -> list[Evaluation]:
    """Everything that the evolution evaluated, in order; `pareto_front` of it is the result.

    The first generation is `seeds`, filled up with random sub-networks. No sub-network comes twice, so the evolution
    also ends where it finds no more new ones.

    Args:
        sizes: trained sizes of each group.
        evaluate: measures sub-networks.
        objectives: two or more.
        seeds: sub-networks to begin with.
        population: sub-networks in a generation.
        seed: of everything random.
        evaluations: at most so many in all.
        aspiration: reference points; with them it is R-NSGA-II.

    Raises:
        UsageError: more seeds than the population has places.
        EnvironmentProblem: pymoo is not installed.
    """
    require_packages(["search"])
    seeds = list(dict.fromkeys(seeds))
    if len(seeds) > population:
        raise UsageError(
            "the seeds do not fit into the population",
            expected=f"at most {population}",
            found=len(seeds),
            fix=f"set population to {len(seeds)} or more",
        )
    budget = Budget(evaluate, evaluations)
    dice = random.Random(seed)
    first = seeds + random_candidates(sizes, population - len(seeds), dice, without=seeds)
    budget.evaluate(first)
    # Groups with one size are no variables: nothing to cross or mutate.
    free = [number for number, group in enumerate(sizes) if len(group) > 1]
    if not free or not budget.left:
        return budget.all()
    scale = _Scale.of([costs(evaluation, objectives) for evaluation in budget.all()])
    algorithm = _algorithm(sizes, free, first, objectives, scale, population, seed, aspiration, budget)
    while budget.left and (generation := algorithm.ask()) is not None:
        asked = [_candidate(row, sizes, free) for row in generation.get("X")]
        budget.evaluate(asked)
        if any(candidate not in budget.seen for candidate in asked):
            break  # the budget ended within this generation
        _tell(algorithm, generation, scale.of_costs([costs(budget.seen[c], objectives) for c in asked]))
    return budget.all()


@dataclass(frozen=True)
class _Scale:
    """Costs in ranges of the first generation, which holds the cheapest and the dearest sub-network.

    R-NSGA-II measures distances across objectives, so they need a common scale. pymoo's own takes the ranges of the
    current front, and divides by zero where all of the front have one accuracy.
    """

    low: Any
    width: Any

    @staticmethod
    def of(rows: list[tuple[float, ...]]) -> _Scale:
        values = np.array(rows, np.float64)
        width = values.max(axis=0) - values.min(axis=0)
        return _Scale(values.min(axis=0), np.where(width > 0, width, 1.0))

    def of_costs(self, rows: Sequence[tuple[float, ...]]) -> Any:
        return (np.array(rows, np.float64) - self.low) / self.width


def _algorithm(
    sizes: Sizes,
    free: list[int],
    first: list[Candidate],
    objectives: Sequence[Objective],
    scale: _Scale,
    population: int,
    seed: int,
    aspiration: Aspiration | None,
    budget: Budget,
) -> Any:
    from pymoo.config import Config

    # pymoo without its compiled modules would say so on standard output, which belongs to results. It may do that as
    # soon as an algorithm is imported.
    Config.warnings["not_compiled"] = False

    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.moo.rnsga2 import RNSGA2
    from pymoo.core.duplicate import DefaultDuplicateElimination
    from pymoo.core.problem import Problem
    from pymoo.core.termination import NoTermination
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair

    class Unseen(DefaultDuplicateElimination):  # type: ignore[misc]
        """Sorts out what the generation has twice, and what was evaluated in any generation before."""

        def _do(self, pop: Any, other: Any, is_duplicate: Any) -> Any:
            is_duplicate = super()._do(pop, other, is_duplicate)
            if algorithm.is_initialized:  # the first generation has been evaluated, and is to be the population
                for number, row in enumerate(pop.get("X")):
                    is_duplicate[number] |= _candidate(row, sizes, free) in budget.seen
            return is_duplicate

    settings: dict[str, Any] = {
        "pop_size": population,
        "sampling": np.array([[to_indices(c, sizes)[number] for number in free] for c in first]),
        "crossover": SBX(prob=_CROSSOVER_PROBABILITY, eta=_ETA, vtype=float, repair=RoundingRepair()),
        "mutation": PM(eta=_ETA, vtype=float, repair=RoundingRepair()),
        "eliminate_duplicates": Unseen(),
    }
    if aspiration is None:
        algorithm = NSGA2(**settings)
    else:
        points = [
            tuple(objective.cost(value) for objective, value in zip(objectives, point, strict=True))
            for point in aspiration.points
        ]
        algorithm = RNSGA2(
            ref_points=scale.of_costs(points),
            epsilon=aspiration.epsilon,
            normalization="no",
            weights=None if aspiration.weights is None else np.array(aspiration.weights, np.float64),
            **settings,
        )
    last = np.array([len(sizes[number]) - 1 for number in free])
    problem = Problem(n_var=len(free), n_obj=len(objectives), xl=np.zeros_like(last), xu=last, vtype=int)
    algorithm.setup(problem, termination=NoTermination(), seed=seed)
    return algorithm


def _tell(algorithm: Any, generation: Any, values: Any) -> None:
    from pymoo.core.evaluator import Evaluator
    from pymoo.problems.static import StaticProblem

    Evaluator().eval(StaticProblem(algorithm.problem, F=values), generation)
    algorithm.tell(infills=generation)


def _candidate(row: Any, sizes: Sizes, free: list[int]) -> Candidate:
    """pymoo's variables as a sub-network."""
    indices = [0] * len(sizes)
    for number, index in zip(free, row, strict=True):
        indices[number] = int(index)
    return from_indices(indices, sizes)
