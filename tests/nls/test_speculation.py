"""Speculative decoding in numbers: the formula and the replay against a simulation that really drafts and checks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.errors import UsageError
from sparseport.nls.speculation import (
    Rounds,
    acceptance,
    best_length,
    break_even,
    replay,
    replayed_speed_up,
    speed_up,
    tokens_per_round,
)

ROWS = st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=8)


def simulated(row: list[bool], k: int) -> tuple[list[int], Rounds]:
    """Two machines that say numbers: the main one counts, the draft says the next number where `row` lets it."""
    said: list[int] = []
    rounds = proposed = accepted = 0
    while len(said) < len(row):
        rounds += 1
        drafted: list[int] = []
        while len(drafted) < k and len(said) + len(drafted) < len(row) - 1:
            place = len(said) + len(drafted)
            drafted.append(place if row[place] else -1)
        proposed += len(drafted)
        checked = list(range(len(said), len(said) + len(drafted) + 1))  # what the main one says at each place
        for guess, right in zip(drafted, checked, strict=False):
            if guess != right:
                break
            said.append(guess)
            accepted += 1
        said.append(len(said))
    return said, Rounds(rounds, len(said), proposed, accepted)


@given(ROWS, st.integers(1, 7))
def test_the_replay_is_what_drafting_and_checking_gives(rows: list[list[bool]], k: int) -> None:
    found = [simulated(row, k) for row in rows]
    assert all(said == list(range(len(row))) for (said, _), row in zip(found, rows, strict=True))
    sums = [sum(values) for values in zip(*(vars(one).values() for _, one in found), strict=True)]
    assert replay(rows, k) == Rounds(*sums)


@given(st.floats(0, 1), st.integers(1, 12))
def test_tokens_of_a_round_are_the_papers_formula(a: float, k: int) -> None:
    expected = k + 1 if a > 1 - 1e-6 else (1 - a ** (k + 1)) / (1 - a)
    assert tokens_per_round(a, k) == pytest.approx(expected, rel=1e-4)
    assert speed_up(a, k, 0.25, 1.5) == pytest.approx(expected / (0.25 * k + 1.5), rel=1e-4)


@pytest.mark.parametrize(("a", "k"), [(0.3, 1), (0.6, 3), (0.9, 5)])
def test_the_formula_is_the_mean_of_many_simulated_rounds(a: float, k: int) -> None:
    row = (np.random.default_rng(0).random(60_000) < a).tolist()
    _, found = simulated(row, k)
    assert found.tokens / found.rounds == pytest.approx(tokens_per_round(a, k), rel=0.01)
    assert acceptance([row]) == pytest.approx(a, rel=0.02)
    assert replayed_speed_up([row], k, 0.4, 1.2) == pytest.approx(speed_up(a, k, 0.4, 1.2), rel=0.01)


@given(ROWS, st.floats(0.01, 2), st.lists(st.floats(1, 4), min_size=1, max_size=6))
def test_the_best_length_is_the_best(rows: list[list[bool]], c: float, verify: list[float]) -> None:
    k, best = best_length(rows, c, verify)
    every = [replayed_speed_up(rows, length, c, v) for length, v in enumerate(verify, 1)]
    assert best == max(every) == every[k - 1] and every.index(best) == k - 1


def test_break_even_lies_where_the_formula_passes_one() -> None:
    verify = [1.1, 1.2, 1.3]
    a = break_even(0.2, verify)
    assert a is not None
    assert any(speed_up(a, k, 0.2, v) > 1 for k, v in enumerate(verify, 1))
    assert not any(speed_up(a - 0.001, k, 0.2, v) > 1 for k, v in enumerate(verify, 1))
    assert break_even(1.0, verify) is None, "a draft as slow as the main network"


def test_a_draft_that_is_always_right_or_never() -> None:
    assert replay([[True] * 9], 3) == Rounds(rounds=3, tokens=9, proposed=6, accepted=6)
    assert replay([[False] * 4], 3) == Rounds(rounds=4, tokens=4, proposed=6, accepted=0)
    with pytest.raises(UsageError, match="no token"):
        acceptance([[]])
