"""Hill climbing and the evolutions on a space whose truth is known; seeds decide everything."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import OBJECTIVE_PAIR, SIZES, evaluate, evaluation_of, everything

from sparseport.errors import EnvironmentProblem, UsageError
from sparseport.nls.search.candidates import heuristic, maximal, minimal, neighbours, random_candidates
from sparseport.nls.search.evolutionary import Aspiration, evolve
from sparseport.nls.search.hill_climbing import best_of, hill_climb
from sparseport.nls.search.objectives import Evaluation, hypervolume, pareto_front

MARKS = [minimal(SIZES), heuristic(SIZES), maximal(SIZES)]
TRUE_FRONT = pareto_front(map(evaluation_of, everything()), OBJECTIVE_PAIR)


class Asked:
    """Evaluates, and keeps every batch it was asked for."""

    def __init__(self):
        self.batches = []

    def __call__(self, candidates):
        self.batches.append(list(candidates))
        return evaluate(candidates)

    def all(self):
        return [candidate for batch in self.batches for candidate in batch]


def climb(asked=evaluate, **options):
    given = {"start": MARKS[1:2], "turns": 8, "neighbours_per_turn": 3, "seed": 0, "evaluations": 1000, **options}
    return hill_climb(SIZES, asked, OBJECTIVE_PAIR, **given)


def evolution(asked=evaluate, **options):
    pytest.importorskip("pymoo")
    given = {"seeds": MARKS, "population": 12, "seed": 0, "evaluations": 60, **options}
    return evolve(SIZES, asked, OBJECTIVE_PAIR, **given)


@settings(max_examples=60)
@given(st.integers(0, 2**16), st.integers(1, 30), st.integers(1, 6), st.integers(3, 80))
def test_a_climb_evaluates_nothing_twice_and_keeps_its_best(seed, turns, near, evaluations):
    asked = Asked()
    found = climb(asked, beside=MARKS, seed=seed, turns=turns, neighbours_per_turn=near, evaluations=evaluations)
    assert [e.candidate for e in found] == asked.all()
    assert len(set(asked.all())) == len(asked.all()) <= min(evaluations, 3 + turns * near)
    best = best_of(found, OBJECTIVE_PAIR)
    assert best.values["accuracy"] == max(e.values["accuracy"] for e in found)
    assert found == climb(beside=MARKS, seed=seed, turns=turns, neighbours_per_turn=near, evaluations=evaluations)


def test_each_turn_asks_for_neighbours_of_the_best_of_the_last_turn_even_if_it_is_worse():
    for seed in range(20):
        asked = Asked()
        climb(asked, seed=seed, turns=4)
        anchors = [best_of(evaluate(batch), OBJECTIVE_PAIR) for batch in asked.batches]
        steps = list(zip(anchors, asked.batches[1:], strict=False))
        assert all(candidate in neighbours(anchor.candidate, SIZES) for anchor, batch in steps for candidate in batch)
        falls = [b.values["accuracy"] < a.values["accuracy"] for a, b in itertools.pairwise(anchors)]
        if any(falls):
            return
    assert False, "no climb went down: the test shows nothing"


def test_a_long_climb_sees_the_whole_space_and_ends():
    found = climb(turns=10_000)
    assert sorted(e.candidate for e in found) == sorted(everything())
    assert best_of(found, OBJECTIVE_PAIR).values["accuracy"] == max(e.values["accuracy"] for e in TRUE_FRONT)


def test_ties_in_accuracy_go_to_the_lower_cost():
    dear, cheap = Evaluation((9,), {"accuracy": 0.5, "macs": 2.0}), Evaluation((8,), {"accuracy": 0.5, "macs": 1.0})
    better = Evaluation((7,), {"accuracy": 0.6, "macs": 9.0})
    assert best_of([dear, cheap], OBJECTIVE_PAIR) == cheap
    assert best_of([dear, cheap, better], OBJECTIVE_PAIR) == better


def test_a_climb_starts_from_the_best_of_its_seeds_and_not_beside_them():
    asked = Asked()
    climb(asked, start=[minimal(SIZES), maximal(SIZES)], beside=[(24, 32, 64, 1)], turns=1)  # that one is the best
    assert asked.batches[0] == [minimal(SIZES), maximal(SIZES), (24, 32, 64, 1)]
    assert set(asked.batches[1]) <= set(neighbours(maximal(SIZES), SIZES))


@pytest.mark.parametrize("seed", range(3))
def test_nsga2_finds_the_true_front(seed):
    """600 of 6561 sub-networks; as many random ones cover clearly less."""
    pytest.importorskip("pymoo")
    sizes = [(3, 2, 1)] * 8

    def measure(candidates):
        return [Evaluation(c, {"accuracy": sum(s**0.5 for s in c), "macs": float(sum(c))}) for c in candidates]

    def values(front):
        return {e.values["macs"]: e.values["accuracy"] for e in front}

    marks = [minimal(sizes), heuristic(sizes), maximal(sizes)]
    found = evolve(sizes, measure, OBJECTIVE_PAIR, seeds=marks, population=40, seed=seed, evaluations=600)
    truth = pareto_front(measure(list(itertools.product(*sizes))), OBJECTIVE_PAIR)
    assert values(pareto_front(found, OBJECTIVE_PAIR)) == pytest.approx(values(truth), rel=1e-12)
    whole = hypervolume(truth, OBJECTIVE_PAIR, (0.0, 25.0))
    chance = measure(random_candidates(sizes, 600, random.Random(seed)))
    assert hypervolume(chance, OBJECTIVE_PAIR, (0.0, 25.0)) < 0.97 * whole


@pytest.mark.parametrize("aspiration", [None, Aspiration(((0.8, 400.0),), 0.01, (0.5, 1.0))])
@pytest.mark.parametrize("evaluations", [12, 13, 30, 60, 500])
def test_an_evolution_keeps_its_budget_and_evaluates_nothing_twice(aspiration, evaluations):
    asked = Asked()
    found = evolution(asked, evaluations=evaluations, aspiration=aspiration)
    assert [e.candidate for e in found] == asked.all()
    assert len(set(asked.all())) == len(asked.all()) <= min(evaluations, 72)
    if evaluations <= 60:
        assert len(asked.all()) == evaluations
    assert asked.batches[0][:3] == MARKS and len(asked.batches[0]) == 12


@pytest.mark.parametrize("aspiration", [None, Aspiration(((0.8, 400.0),))])
def test_an_evolution_repeats_by_its_seed_whatever_numpy_has_drawn(aspiration):
    import numpy as np

    first = evolution(seed=3, aspiration=aspiration)
    np.random.default_rng().random(5)
    np.random.seed(random.randrange(2**32))
    assert evolution(seed=3, aspiration=aspiration) == first
    assert evolution(seed=4, aspiration=aspiration) != first


def test_rnsga2_gathers_around_its_reference_points():
    """In a larger space, more of what it evaluates lies near the point than NSGA-II's does."""
    pytest.importorskip("pymoo")
    sizes = [tuple(range(8, 0, -1))] * 6

    def measure(candidates):
        return [
            Evaluation(c, {"accuracy": 1 - sum((8 - s) ** 2 for s in c) / 300, "macs": float(sum(c))})
            for c in candidates
        ]

    def near(aspiration, seed):
        found = evolve(
            sizes,
            measure,
            OBJECTIVE_PAIR,
            seeds=[minimal(sizes), heuristic(sizes), maximal(sizes)],
            population=20,
            seed=seed,
            evaluations=400,
            aspiration=aspiration,
        )
        return sum(abs(e.values["macs"] - 40) <= 2 for e in found[-200:])

    for seed in range(3):
        assert near(Aspiration(((0.95, 40.0),), 0.001), seed) > 1.5 * near(None, seed)


def test_an_objective_that_never_changes_stops_nothing():
    flat = [Evaluation(c, {"accuracy": 0.5, "macs": e.values["macs"]}) for c in everything() for e in evaluate([c])]
    table = {e.candidate: e for e in flat}
    found = evolution(lambda batch: [table[c] for c in batch], aspiration=Aspiration(((0.5, 100.0),)))
    assert 40 <= len(found) <= 60 and pareto_front(found, OBJECTIVE_PAIR) == [table[minimal(SIZES)]]


def test_groups_with_one_size_are_no_variables():
    pytest.importorskip("pymoo")

    def measure(candidates):
        return [Evaluation(c, {"accuracy": c[1] / 9, "macs": float(c[1])}) for c in candidates]

    fixed = {"seeds": [(5, 1, 7)], "population": 4, "seed": 0, "evaluations": 9}
    found = evolve([(5,), tuple(range(9, 0, -1)), (7,)], measure, OBJECTIVE_PAIR, **fixed)
    assert {e.candidate for e in found} <= {(5, n, 7) for n in range(1, 10)} and len(found) > 4
    # They take no part in the chances of mutation either: the search is the same without them.
    free = [(9, 7, 5, 3, 1), (8, 6, 4, 2)]
    padded = [(1,), free[0], (1,), (1,), free[1]]
    seeds = [(9, 8), (5, 4), (1, 2), (7, 2)]

    def price(candidates):
        return [Evaluation(c, {"accuracy": c[0] * c[-1] / 99, "macs": float(sum(c))}) for c in candidates]

    def padded_price(candidates):
        inner = price([(c[1], c[4]) for c in candidates])
        return [Evaluation(c, e.values) for c, e in zip(candidates, inner, strict=True)]

    more = {**fixed, "evaluations": 16}
    alone = evolve(free, price, OBJECTIVE_PAIR, **{**more, "seeds": seeds})
    among = evolve(padded, padded_price, OBJECTIVE_PAIR, **{**more, "seeds": [(1, a, 1, 1, b) for a, b in seeds]})
    assert [e.candidate for e in alone] == [(e.candidate[1], e.candidate[4]) for e in among] and len(alone) > 8
    assert len(evolve([(5,), (1,), (7,)], measure, OBJECTIVE_PAIR, **fixed)) == 1


def test_more_seeds_than_places_are_refused():
    with pytest.raises(UsageError, match="at most 4"):
        evolution(seeds=everything()[:5], population=4)


def test_without_pymoo_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymoo", None)
    monkeypatch.setattr("sparseport.extras.find_spec", lambda name: None if name == "pymoo" else object())
    with pytest.raises(EnvironmentProblem, match=r"pip install 'sparseport\[search\]'"):
        evolve(SIZES, evaluate, OBJECTIVE_PAIR, seeds=MARKS, population=12, seed=0, evaluations=60)


def test_pymoo_says_nothing_on_standard_output_not_even_without_its_compiled_modules():
    pytest.importorskip("pymoo")
    code = """
import sys
sys.modules["pymoo.functions.compiled"] = None
from toy import SIZES, OBJECTIVE_PAIR, evaluate
from sparseport.nls.search.evolutionary import evolve
evolve(SIZES, evaluate, OBJECTIVE_PAIR, seeds=[], population=4, seed=0, evaluations=8)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
