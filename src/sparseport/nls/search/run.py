"""One search from its recipe to its result: strategy, journal, workers, choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sparseport.errors import UsageError
from sparseport.extras import require_packages
from sparseport.nls.search.answers import MakeEvaluator
from sparseport.nls.search.candidates import (
    Candidate,
    Group,
    check_candidate,
    label_of,
    named_candidates,
    number_of_candidates,
    sizes_of,
    space_digest,
)
from sparseport.nls.search.evolutionary import Aspiration, evolve
from sparseport.nls.search.front import SearchResult, front_of
from sparseport.nls.search.heuristics import Sample, lowest_loss, most_sampled
from sparseport.nls.search.hill_climbing import hill_climb
from sparseport.nls.search.journal import Journal, RunIdentity, open_journal
from sparseport.nls.search.objectives import (
    OBJECTIVES,
    Evaluate,
    Evaluation,
    Objective,
    cheapest_within,
    check_values,
)
from sparseport.nls.search.workers import Team, open_team
from sparseport.progress import Progress, Step
from sparseport.recipe import SearchRecipe

# Settings that decide which way a strategy goes. How long it goes, who computes and what is chosen at the end may
# change from one run on a journal to the next.
_STEERING = {
    "hill_climbing": ("seed", "neighbours"),
    "nsga2": ("seed", "population"),
    "rnsga2": ("seed", "population", "reference_points", "epsilon", "weights"),
    "heuristics": ("lowest_loss", "minimum_samples"),
}
_LENGTH = {
    "hill_climbing": ("turns", "evaluations"),
    "nsga2": ("evaluations",),
    "rnsga2": ("evaluations",),
    "heuristics": (),
}
_AN = {"accuracy": "an accuracy", "acceptance": "an acceptance", "speculation": "a predicted speed-up"}
_EXTRAS: dict[str, tuple[str, ...]] = {
    **{"hill_climbing": (), "nsga2": ("search",), "rnsga2": ("search",), "heuristics": ()},
    **{"local": (), "processes": (), "ray": ("distributed",)},
}


def search(
    groups: Sequence[Group],
    make_evaluator: MakeEvaluator,
    recipe: SearchRecipe,
    journal_path: Path,
    *,
    evaluation_digest: str,
    record: Sequence[Sample] | None = None,
    seeds: Mapping[str, Candidate] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Search, or go on with a search that was interrupted: the same journal gives the result of one that was not.

    Args:
        groups: the search space.
        make_evaluator: makes what measures a sub-network; called once in each worker, and only if something is left
            to measure. The measured values are those of `recipe.objectives`.
        recipe: strategy, objectives, budget, workers.
        journal_path: file for the evaluations; made, or continued.
        evaluation_digest: SHA-256 of everything that decides a measurement: weights, data, settings, versions.
        record: steps of the training; the heuristics need them.
        seeds: further sub-networks to begin with, by names.
        progress: where to report; None: nowhere.

    Raises:
        BadInput: the search space, a seed, a measured value or the journal is damaged.
        UsageError: the journal is another search's, a seed has a name that is taken, there are more seeds than the
            recipe has room for, or the heuristics have no record.
        OutputExists: another process writes the journal.
        EnvironmentProblem: a package is missing, or a worker died too often.
        SparseportError: what the evaluator raised, naming the sub-network.
    """
    require_packages(_EXTRAS[recipe.strategy] + _EXTRAS[recipe.backend])
    sizes = sizes_of(groups)
    objectives = tuple(OBJECTIVES[name] for name in recipe.objectives)
    marks = named_candidates(sizes)
    begin = _begin(groups, recipe, marks, record, seeds or {})
    identity = _identity(groups, recipe, evaluation_digest, begin)
    progress = progress or Progress("quiet")
    with (
        open_journal(journal_path, identity) as journal,
        open_team(
            make_evaluator,
            backend=recipe.backend,
            workers=recipe.workers,
            retries=recipe.retries,
            gpus=recipe.worker_gpus,
        ) as team,
    ):
        if journal.done:
            progress.note(f"{len(journal.done)} evaluations are in the journal already")
        with progress.task("evaluating sub-networks", _expected(recipe, sizes, begin)) as step:
            measure = _measure(journal, team, objectives, step)
            evaluations = _strategy(sizes, measure, objectives, recipe, begin, marks)
        chosen, reason = _choose(evaluations, objectives, recipe)
        return SearchResult(
            strategy={
                **identity.header()["strategy"],
                **{name: getattr(recipe, name) for name in _LENGTH[recipe.strategy]},
            },
            space=space_digest(groups),
            evaluation=evaluation_digest,
            objectives=objectives,
            evaluations=tuple(evaluations),
            front=front_of(evaluations, objectives),
            seeds=begin,
            chosen=chosen,
            reason=reason,
            journal_sha256=journal.sha256(),
            seconds=sum(evaluation.seconds for evaluation in evaluations),
        )


def identity_of(
    groups: Sequence[Group],
    recipe: SearchRecipe,
    *,
    evaluation_digest: str,
    record: Sequence[Sample] | None = None,
    seeds: Mapping[str, Candidate] | None = None,
) -> RunIdentity:
    """What makes the search that `search` would make of these arguments the one that it is, without making it.

    Raises:
        BadInput, UsageError: see `search`.
    """
    begin = _begin(groups, recipe, named_candidates(sizes_of(groups)), record, seeds or {})
    return _identity(groups, recipe, evaluation_digest, begin)


def _identity(
    groups: Sequence[Group], recipe: SearchRecipe, evaluation_digest: str, begin: Mapping[str, Candidate]
) -> RunIdentity:
    return RunIdentity(
        groups,
        evaluation_digest,
        tuple(OBJECTIVES[name] for name in recipe.objectives),
        {
            "name": recipe.strategy,
            **{name: getattr(recipe, name) for name in _STEERING[recipe.strategy]},
            "seeds": {name: list(candidate) for name, candidate in begin.items()},
        },
    )


def _begin(
    groups: Sequence[Group],
    recipe: SearchRecipe,
    marks: Mapping[str, Candidate],
    record: Sequence[Sample] | None,
    seeds: Mapping[str, Candidate],
) -> dict[str, Candidate]:
    """Every sub-network that has a name, the marks first."""
    begin = dict(marks)
    if recipe.strategy == "heuristics":
        if record is None:
            raise UsageError(
                "the heuristics need the training record",
                expected="training_record.jsonl, which stands beside the adapter",
                fix="train again, or choose another strategy: hill_climbing, nsga2 or rnsga2",
            )
        begin["most sampled"] = most_sampled(record, sizes_of(groups))
        low = lowest_loss(record, recipe.lowest_loss, minimum_samples=recipe.minimum_samples)
        begin |= {f"lowest loss {number}": candidate for number, candidate in enumerate(low, 1)}
    for name, candidate in seeds.items():
        if name in begin:
            raise UsageError("a seed has a name that is taken", where=name, expected="another name")
        begin[name] = check_candidate(candidate, groups, f"seed {name}")
    room = {"hill_climbing": recipe.evaluations, "heuristics": len(begin)}.get(recipe.strategy, recipe.population)
    if len(set(begin.values())) > room:
        raise UsageError(
            "there are more seeds than the search has room for",
            expected=f"at most {room}",
            found=len(set(begin.values())),
            fix="raise population and evaluations, or leave out seeds",
        )
    return begin


def _measure(journal: Journal, team: Team, objectives: Sequence[Objective], step: Step) -> Evaluate:
    """Answers from the journal where it can, and writes what it has to measure into it."""

    def measure(candidates: Sequence[Candidate]) -> list[Evaluation]:
        missing = []
        for candidate in candidates:
            if candidate in journal.done:
                step()
            else:
                missing.append(candidate)
        for evaluation in team.evaluate_all(missing):
            values = check_values(evaluation.values, objectives, label_of(evaluation.candidate))
            journal.add(Evaluation(evaluation.candidate, values, evaluation.seconds))
            step()
        return [journal.done[candidate] for candidate in candidates]

    return measure


def _strategy(
    sizes: Sequence[tuple[int, ...]],
    measure: Evaluate,
    objectives: Sequence[Objective],
    recipe: SearchRecipe,
    begin: Mapping[str, Candidate],
    marks: Mapping[str, Candidate],
) -> list[Evaluation]:
    if recipe.strategy == "heuristics":
        return measure(list(dict.fromkeys(begin.values())))
    if recipe.strategy == "hill_climbing":
        start = [candidate for name, candidate in begin.items() if name == "heuristic" or name not in marks]
        return hill_climb(
            sizes,
            measure,
            objectives,
            start=start,
            beside=marks.values(),
            turns=recipe.turns,
            neighbours_per_turn=recipe.neighbours,
            seed=recipe.seed,
            evaluations=recipe.evaluations,
        )
    aspiration = None
    if recipe.strategy == "rnsga2":
        aspiration = Aspiration(recipe.reference_points, recipe.epsilon, recipe.weights)
    return evolve(
        sizes,
        measure,
        objectives,
        seeds=list(begin.values()),
        population=recipe.population,
        seed=recipe.seed,
        evaluations=recipe.evaluations,
        aspiration=aspiration,
    )


def _expected(recipe: SearchRecipe, sizes: Sequence[tuple[int, ...]], begin: Mapping[str, Candidate]) -> int:
    """How many evaluations the search makes at most."""
    named = len(set(begin.values()))
    most = {
        "heuristics": named,
        "hill_climbing": min(recipe.evaluations, named + recipe.turns * recipe.neighbours),
    }.get(recipe.strategy, recipe.evaluations)
    return min(most, number_of_candidates(sizes))


def _choose(
    evaluations: Sequence[Evaluation], objectives: Sequence[Objective], recipe: SearchRecipe
) -> tuple[Candidate | None, str]:
    """The sub-network to take, and why."""
    quality = objectives[0].name
    best = max(evaluation.values[quality] for evaluation in evaluations)
    reference = best if recipe.reference_accuracy is None else recipe.reference_accuracy
    chosen = cheapest_within(evaluations, objectives, reference, recipe.accuracy_delta)
    origin = "the best measured" if recipe.reference_accuracy is None else "the reference"
    if chosen is None:
        return None, (
            f"no sub-network has {_AN[quality]} of {reference!r} ({origin}) less {recipe.accuracy_delta!r}; "
            f"the best has {best!r}"
        )
    cheap = " and ".join(objective.name for objective in objectives[1:])
    if recipe.accuracy_delta == 0.0 and recipe.reference_accuracy is None:
        ties = f"; among equals the lowest {cheap}" if cheap else ""
        return chosen.candidate, f"the highest {quality}, {best!r}{ties}"
    return chosen.candidate, (
        f"{f'the lowest {cheap}' if cheap else f'the highest {quality}'} among those with {_AN[quality]} of at least "
        f"{reference!r} ({origin}) less {recipe.accuracy_delta!r}"
    )
