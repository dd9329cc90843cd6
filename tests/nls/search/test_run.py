"""A search as a whole: resumed after a crash anywhere it ends as if there had been none; what it chooses and why."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from toy import GROUPS, SIZES, Maker, evaluation_of, everything, values_of

from sparseport.errors import BadInput, EnvironmentProblem, UsageError
from sparseport.nls.search.candidates import heuristic, maximal, minimal, neighbours
from sparseport.nls.search.heuristics import Sample
from sparseport.nls.search.objectives import OBJECTIVES, pareto_front
from sparseport.nls.search.run import search
from sparseport.progress import Progress
from sparseport.recipe import SearchRecipe

STRATEGIES = {
    "hill_climbing": SearchRecipe(turns=5, neighbours=3, seed=1),
    "nsga2": SearchRecipe(strategy="nsga2", evaluations=30, population=8, seed=1),
    "rnsga2": SearchRecipe(
        strategy="rnsga2", evaluations=30, population=8, seed=1, reference_points=((0.85, 380.0), (0.7, 100.0))
    ),
    "heuristics": SearchRecipe(strategy="heuristics", lowest_loss=4),
}
dice = random.Random(0)
RECORD = [Sample(dice.choice(everything()), dice.random()) for _ in range(200)]
NEEDS_PYMOO = ("nsga2", "rnsga2")


class Crash(BaseException):
    """Nothing that a worker catches, like a signal."""


@dataclass
class Counting:
    """Makes an evaluator that counts, and crashes after so many evaluations."""

    crash_after: int = 10**9
    done: int = 0

    def __call__(self):
        return self.evaluate

    def evaluate(self, candidate):
        if self.done == self.crash_after:
            raise Crash
        self.done += 1
        return values_of(candidate)


def run(path: Path, recipe: SearchRecipe, make=None, **options):
    if recipe.strategy in NEEDS_PYMOO:
        pytest.importorskip("pymoo")
    return search(GROUPS, make or Counting(), recipe, path, evaluation_digest="e" * 64, **{"record": RECORD, **options})


def outcome(result):
    """Everything but what differs from run to run: the times, and with them the journal's digest."""
    return dataclasses.replace(result, journal_sha256="", seconds=0.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_resumed_after_a_crash_anywhere_ends_like_one_that_never_crashed(tmp_path, strategy):
    recipe = STRATEGIES[strategy]
    whole = run(tmp_path / "whole", recipe)
    number = len(whole.evaluations)
    assert number >= 7
    for crash_after in range(number):
        path = tmp_path / str(crash_after)
        first, second = Counting(crash_after), Counting()
        with pytest.raises(Crash):
            run(path, recipe, first)
        assert outcome(run(path, recipe, second)) == outcome(whole)
        assert first.done + second.done == number  # nothing was evaluated twice


def test_a_search_that_crashes_again_and_again_gets_there(tmp_path):
    recipe, path = STRATEGIES["nsga2"], tmp_path / "journal"
    crashes = 0
    while True:
        try:
            result = run(path, recipe, Counting(1))
            break
        except Crash:
            crashes += 1
    assert crashes == 29 and outcome(result) == outcome(run(tmp_path / "whole", recipe))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_finished_search_is_read_from_its_journal_without_an_evaluator(tmp_path, strategy):
    def never():
        raise AssertionError

    first = run(tmp_path / "journal", STRATEGIES[strategy])
    assert run(tmp_path / "journal", STRATEGIES[strategy], never) == first


def test_the_number_of_workers_makes_no_difference(tmp_path):
    recipe = STRATEGIES["hill_climbing"]
    (tmp_path / "toy").mkdir()
    maker = Maker(tmp_path / "toy", kill_once=maximal(SIZES))
    parallel = recipe.model_copy(update={"backend": "processes", "workers": 2})
    assert outcome(run(tmp_path / "two", parallel, maker)) == outcome(run(tmp_path / "one", recipe))
    assert (tmp_path / "toy" / "killed").exists()


def test_a_journal_of_other_settings_is_refused_before_any_work(tmp_path):
    path, recipe = tmp_path / "journal", STRATEGIES["nsga2"]
    run(path, recipe)
    changes = (
        ({"seed": 2}, {}, "the strategy's seed"),
        ({"population": 9}, {}, "the strategy's population"),
        ({"objectives": ("accuracy", "latency")}, {}, "the objectives"),
        ({}, {"seeds": {"mine": (24, 32, 64, 1)}}, "the strategy's seeds"),
    )
    for change, options, name in changes:
        maker = Counting()
        with pytest.raises(UsageError, match=f"another search: {name} is different"):
            run(path, SearchRecipe(**{**recipe.model_dump(), **change}), maker, **options)
        assert maker.done == 0
    with pytest.raises(UsageError, match="the strategy's name is different"):
        run(path, STRATEGIES["hill_climbing"])


def test_a_longer_search_goes_on_with_the_journal_of_a_shorter_one(tmp_path):
    recipe = STRATEGIES["nsga2"]
    longer = recipe.model_copy(update={"evaluations": 41})
    run(tmp_path / "journal", recipe)
    more = Counting()
    assert outcome(run(tmp_path / "journal", longer, more)) == outcome(run(tmp_path / "fresh", longer))
    assert more.done == 11


def test_the_result_says_what_was_found(tmp_path):
    result = run(tmp_path / "journal", STRATEGIES["nsga2"], seeds={"mine": (24, 16, 64, 1)})
    assert result.seeds == {
        "minimal": minimal(SIZES),
        "heuristic": heuristic(SIZES),
        "maximal": maximal(SIZES),
        "mine": (24, 16, 64, 1),
    }
    assert [e.candidate for e in result.evaluations[:4]] == list(result.seeds.values())
    assert all(e == evaluation_of(e.candidate) for e in result.evaluations) and len(result.evaluations) == 30
    assert result.front == tuple(e.candidate for e in pareto_front(result.evaluations, result.objectives))
    assert result.chosen == result.front[0] and result.reason.startswith("the highest accuracy, 0.9")
    assert result.strategy["name"] == "nsga2" and result.strategy["evaluations"] == 30
    assert result.seconds == sum(e.seconds for e in result.evaluations) > 0


def test_the_choice_follows_reference_and_delta_and_costs_no_evaluation(tmp_path):
    path, recipe = tmp_path / "journal", STRATEGIES["nsga2"]
    whole = run(path, recipe)
    again = Counting()
    for settings, least in (
        ({"accuracy_delta": 0.1}, whole.of(whole.front[0]).values["accuracy"] - 0.1),
        ({"reference_accuracy": 0.8}, 0.8),
        ({"reference_accuracy": 0.8, "accuracy_delta": 0.2}, 0.6),
    ):
        result = run(path, SearchRecipe(**{**recipe.model_dump(), **settings}), again)
        enough = [e for e in whole.evaluations if e.values["accuracy"] >= least - 1e-9]
        assert result.of(result.chosen).values["macs"] == min(e.values["macs"] for e in enough)
        assert "the lowest macs among those with an accuracy of at least" in result.reason
    result = run(path, recipe.model_copy(update={"reference_accuracy": 0.99}), again)
    assert result.chosen is None and result.reason.startswith("no sub-network has an accuracy of 0.99")
    assert again.done == 0


def test_a_climb_begins_at_the_heuristic_and_at_seeds_of_the_users_own(tmp_path):
    """The maximal sub-network is better than both here, and only looked at."""
    recipe = SearchRecipe(turns=1, neighbours=20)
    result = run(tmp_path / "one", recipe)
    marks = {minimal(SIZES), heuristic(SIZES), maximal(SIZES)}
    first = {e.candidate for e in result.evaluations} - marks
    assert first == set(neighbours(heuristic(SIZES), SIZES)) - marks
    mine = (24, 16, 48, 1)  # better than the heuristic
    result = run(tmp_path / "two", recipe, seeds={"mine": mine})
    assert {e.candidate for e in result.evaluations} - marks - {mine} == set(neighbours(mine, SIZES)) - marks


def test_one_objective_is_enough_to_climb(tmp_path):
    def accuracy_only():
        return lambda candidate: {"accuracy": values_of(candidate)["accuracy"]}

    result = run(tmp_path / "journal", SearchRecipe(objectives=("accuracy",)), accuracy_only)
    assert result.objectives == (OBJECTIVES["accuracy"],) and result.front == (result.chosen,)
    assert result.of(result.chosen).values["accuracy"] == max(e.values["accuracy"] for e in result.evaluations)


def test_the_heuristics_evaluate_what_the_record_suggests(tmp_path):
    result = run(tmp_path / "journal", STRATEGIES["heuristics"])
    names = ["minimal", "heuristic", "maximal", "most sampled", *(f"lowest loss {n}" for n in (1, 2, 3, 4))]
    assert list(result.seeds) == names
    assert {e.candidate for e in result.evaluations} == set(result.seeds.values())
    with pytest.raises(UsageError, match="the heuristics need the training record"):
        run(tmp_path / "other", STRATEGIES["heuristics"], record=None)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("seeds", "error", "message"),
    [
        ({"maximal": (24, 16, 64, 1)}, UsageError, "a name that is taken"),
        (
            {"mine": (25, 16, 64, 1)},
            BadInput,
            r"seed mine, group 0 .* expected one of \[32, 24, 16\]",
        ),
        ({str(n): c for n, c in enumerate(everything()[10:20])}, UsageError, "expected at most 8"),
    ],
)
def test_bad_seeds_are_refused_before_there_is_a_journal(tmp_path, seeds, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path / "journal", STRATEGIES["nsga2"], seeds=seeds)
    assert not (tmp_path / "journal").exists()


def test_a_value_that_cannot_be_ranked_ends_the_search_and_leaves_the_journal_whole(tmp_path):
    def broken():
        return lambda candidate: (
            {"accuracy": float("nan"), "macs": 1.0} if candidate == maximal(SIZES) else values_of(candidate)
        )

    recipe = STRATEGIES["hill_climbing"]
    with pytest.raises(BadInput, match=r"accuracy is not a finite number; in sub-network \[32, 32, 64, 1\]"):
        run(tmp_path / "journal", recipe, broken)
    assert outcome(run(tmp_path / "journal", recipe)) == outcome(run(tmp_path / "fresh", recipe))


@pytest.mark.parametrize(
    ("recipe", "package"),
    [
        (STRATEGIES["nsga2"], "pymoo"),
        (SearchRecipe(backend="ray"), "ray"),
    ],
)
def test_a_missing_package_is_told_before_there_is_a_journal(tmp_path, monkeypatch, recipe, package):
    monkeypatch.setattr("sparseport.extras.find_spec", lambda name: None if name == package else object())
    with pytest.raises(EnvironmentProblem, match="pip install 'sparseport"):
        search(GROUPS, Counting(), recipe, tmp_path / "journal", evaluation_digest="e" * 64)
    assert not (tmp_path / "journal").exists()


def test_progress_counts_evaluations_old_and_new(tmp_path, capsys):
    run(tmp_path / "journal", STRATEGIES["nsga2"], progress=Progress("json"))
    assert '"done": 30, "total": 30' in capsys.readouterr().err
    run(tmp_path / "journal", STRATEGIES["nsga2"], progress=Progress("json"))
    err = capsys.readouterr().err
    assert "30 evaluations are in the journal already" in err and '"done": 30, "total": 30' in err
