"""Dominance, front, hypervolume and choice, each against a second implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import OBJECTIVE_PAIR

from sparseport.errors import BadInput
from sparseport.nls.search.objectives import (
    OBJECTIVES,
    Evaluation,
    Objective,
    cheapest_within,
    check_values,
    dominates,
    hypervolume,
    pareto_front,
)
from sparseport.recipe import SearchRecipe

# Few distinct values, so that ties are common.
points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30)


def made(rows):
    return [Evaluation((n,), {"accuracy": a / 8, "macs": float(m)}) for n, (a, m) in enumerate(rows)]


@given(points)
def test_the_front_is_what_nothing_dominates(rows):
    evaluations = made(rows)
    front = {e.candidate for e in pareto_front(evaluations, OBJECTIVE_PAIR)}
    expected = {
        (n,) for n, (a, m) in enumerate(rows) if not any(b >= a and k <= m and (b, k) != (a, m) for b, k in rows)
    }
    assert front == expected


@given(points)
def test_front_and_hypervolume_agree_with_pymoo(rows):
    pytest.importorskip("pymoo")
    from pymoo.indicators.hv import HV
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    evaluations = made(rows)
    table = np.array([[-e.values["accuracy"], e.values["macs"]] for e in evaluations])
    theirs = {(int(n),) for n in NonDominatedSorting().do(table, only_non_dominated_front=True)}
    assert {e.candidate for e in pareto_front(evaluations, OBJECTIVE_PAIR)} == theirs
    area = hypervolume(evaluations, OBJECTIVE_PAIR, (0.1, 7.5))
    assert math.isclose(area, float(HV(ref_point=np.array([-0.1, 7.5]))(table)), abs_tol=1e-12)


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=20))
def test_the_front_of_three_objectives(rows):
    objectives = [OBJECTIVES[name] for name in ("accuracy", "macs", "latency")]
    evaluations = [
        Evaluation((n,), dict(zip(("accuracy", "macs", "latency"), map(float, row), strict=True)))
        for n, row in enumerate(rows)
    ]
    front = pareto_front(evaluations, objectives)
    for evaluation in evaluations:
        beaten = any(dominates(other, evaluation, objectives) for other in evaluations)
        assert (evaluation in front) is not beaten


def test_the_front_comes_best_first_and_does_not_depend_on_the_order():
    evaluations = made([(1, 1), (5, 4), (3, 2), (2, 2), (5, 4)])
    front = pareto_front(evaluations, OBJECTIVE_PAIR)
    assert [e.candidate for e in front] == [(1,), (4,), (2,), (0,)]
    assert pareto_front(evaluations[::-1], OBJECTIVE_PAIR) == front


def test_direction_decides_what_dominates():
    low, high = (Evaluation((n,), {"x": float(n)}) for n in (1, 2))
    assert dominates(high, low, [Objective("x", "max")]) and not dominates(low, high, [Objective("x", "max")])
    assert dominates(low, high, [Objective("x", "min")]) and not dominates(low, low, [Objective("x", "min")])


def test_hypervolume_of_a_known_front():
    # Rectangles up to accuracy 0 and 10 MACs: (10 - 2) * 0.5, then (10 - 6) * (0.75 - 0.5).
    assert hypervolume(made([(4, 2), (6, 6), (3, 3)]), OBJECTIVE_PAIR, (0.0, 10.0)) == 5.0
    with pytest.raises(BadInput, match="two objectives"):
        hypervolume([], OBJECTIVE_PAIR[:1], (0.0,))


@given(points, st.integers(0, 8), st.integers(0, 8))
def test_the_choice_is_the_cheapest_that_is_accurate_enough(rows, reference, delta):
    chosen = cheapest_within(made(rows), OBJECTIVE_PAIR, reference / 8, delta / 8)
    enough = [(m, -a, n) for n, (a, m) in enumerate(rows) if a >= reference - delta]
    assert (chosen.candidate if chosen else None) == ((min(enough)[2],) if enough else None)


def test_a_difference_of_decimal_fractions_does_not_exclude_its_own_value():
    only = Evaluation((1,), {"accuracy": 0.7, "macs": 1.0})
    assert 0.8 - 0.1 > 0.7
    assert cheapest_within([only], OBJECTIVE_PAIR, 0.8, 0.1) == only


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"accuracy": 0.5}, "accuracy"),
        ({"accuracy": 0.5, "macs": 1, "latency": 1}, "accuracy, macs, latency"),
        ({}, "none"),
        ({"accuracy": math.nan, "macs": 1}, "nan"),
        ({"accuracy": 0.5, "macs": math.inf}, "inf"),
        ({"accuracy": "0.5", "macs": 1}, "'0.5'"),
        ({"accuracy": True, "macs": 1}, "True"),
    ],
)
def test_values_that_cannot_be_ranked_are_refused(values, found):
    with pytest.raises(BadInput) as raised:
        check_values(values, OBJECTIVE_PAIR, "sub-network [1]")
    assert (raised.value.where, raised.value.found, raised.value.code) == ("sub-network [1]", found, "E_EVALUATION")


def test_values_come_in_the_order_of_the_objectives():
    assert list(check_values({"macs": 1, "accuracy": 0.5}, OBJECTIVE_PAIR, "x").items()) == [
        ("accuracy", 0.5),
        ("macs", 1.0),
    ]


def test_every_objective_of_a_recipe_is_known():
    names = SearchRecipe.model_json_schema()["properties"]["objectives"]["items"]["enum"]
    assert sorted(names) == sorted(OBJECTIVES)
