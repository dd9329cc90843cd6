"""The result of a search as a JSON file: everything that was evaluated, the front, the choice and its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import read_json, write_json
from sparseport.errors import BadInput, SparseportError, Unsupported
from sparseport.nls.search.candidates import Candidate
from sparseport.nls.search.objectives import Evaluation, Objective, check_values, pareto_front

SCHEMA = 1
_SCHEMA_KEY = "sparseport_search_result"
_KEYS = (_SCHEMA_KEY, "strategy", "space", "evaluation", "objectives", "evaluations", "front", "seeds", "chosen")
_LAST_KEYS = ("reason", "journal_sha256", "seconds")
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    strategy        its settings with the seed, and how many evaluations it was allowed
    space           SHA-256 of the search space (`candidates.space_digest`)
    evaluation      SHA-256 of everything that decides what an evaluation yields
    objectives      in their order; the first is the accuracy, or for a draft acceptance or speculation
    evaluations     everything that this search asked for, in the order of asking
    front           the sub-networks that none other dominates, the most accurate first
    seeds           name -> sub-network that the search began with or looked at as a mark
    chosen          the sub-network to take; None if none is accurate enough
    reason          why this one, in words
    journal_sha256  of the journal's file
    seconds         sum over all evaluations
    """

    strategy: Mapping[str, Any]
    space: str
    evaluation: str
    objectives: tuple[Objective, ...]
    evaluations: tuple[Evaluation, ...]
    front: tuple[Candidate, ...]
    seeds: Mapping[str, Candidate]
    chosen: Candidate | None
    reason: str
    journal_sha256: str
    seconds: float

    def of(self, candidate: Candidate) -> Evaluation:
        """The evaluation of a sub-network of this result."""
        return next(evaluation for evaluation in self.evaluations if evaluation.candidate == candidate)


def front_of(evaluations: Sequence[Evaluation], objectives: Sequence[Objective]) -> tuple[Candidate, ...]:
    """Sub-networks of the Pareto front, the most accurate first."""
    return tuple(evaluation.candidate for evaluation in pareto_front(evaluations, objectives))


def write_result(path: Path, result: SearchResult) -> None:
    """Write the result; the file appears whole or not at all."""
    content = {
        _SCHEMA_KEY: SCHEMA,
        "strategy": dict(result.strategy),
        "space": result.space,
        "evaluation": result.evaluation,
        "objectives": [{"name": o.name, "direction": o.direction, "unit": o.unit} for o in result.objectives],
        "evaluations": [
            {"sizes": list(e.candidate), "values": e.values, "seconds": e.seconds} for e in result.evaluations
        ],
        "front": [list(candidate) for candidate in result.front],
        "seeds": {name: list(candidate) for name, candidate in result.seeds.items()},
        "chosen": None if result.chosen is None else list(result.chosen),
        "reason": result.reason,
        "journal_sha256": result.journal_sha256,
        "seconds": result.seconds,
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_json(partial, content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_result(path: Path) -> SearchResult:
    """Read a result and check that it agrees with itself: the front is computed again.

    Raises:
        BadInput: E_RESULT for what is no result or contradicts itself; E_JSON, E_LIMIT, E_MISSING or E_PATH.
        Unsupported: a newer sparseport wrote it.
    """
    data = read_json(path, limit=_MAX_BYTES, what="search result")
    schema = data.get(_SCHEMA_KEY)
    if type(schema) is int and schema > SCHEMA:
        raise Unsupported(
            "the search result has a newer schema",
            where=path,
            expected=f"<= {SCHEMA}",
            found=schema,
            fix="upgrade sparseport",
        )
    if type(schema) is not int or schema != SCHEMA:
        raise _wrong(path, "it has no known schema", f"{_SCHEMA_KEY}: {SCHEMA}", schema)
    if tuple(data) != (*_KEYS, *_LAST_KEYS):
        raise _wrong(path, "its fields are others", ", ".join((*_KEYS, *_LAST_KEYS)), ", ".join(data))
    for name, kind in (
        *(("strategy", dict), ("seeds", dict), ("objectives", list), ("evaluations", list), ("front", list)),
        *(("space", str), ("evaluation", str), ("reason", str), ("journal_sha256", str)),
    ):
        if not isinstance(data[name], kind):
            raise _wrong(path, f"{name} has the wrong type", kind.__name__, data[name])
    objectives = tuple(_objective(entry, path) for entry in data["objectives"])
    if not objectives or not data["evaluations"]:
        raise _wrong(path, "it has no objectives or no evaluations", None, None)
    evaluations = tuple(_evaluation(entry, n, objectives, path) for n, entry in enumerate(data["evaluations"]))
    known = {evaluation.candidate for evaluation in evaluations}
    if len(known) != len(evaluations) or len({len(candidate) for candidate in known}) != 1:
        raise _wrong(path, "a sub-network is there twice, or they have different numbers of groups", None, None)
    front = tuple(_known(entry, known, "front", path) for entry in data["front"])
    if front != front_of(evaluations, objectives):
        raise _wrong(path, "the front is not that of the evaluations", None, None)
    return SearchResult(
        strategy=data["strategy"],
        space=data["space"],
        evaluation=data["evaluation"],
        objectives=objectives,
        evaluations=evaluations,
        front=front,
        seeds={name: _known(entry, known, f"seed {name}", path) for name, entry in data["seeds"].items()},
        chosen=None if data["chosen"] is None else _known(data["chosen"], known, "chosen", path),
        reason=data["reason"],
        journal_sha256=data["journal_sha256"],
        seconds=_seconds(data["seconds"], "the whole", path),
    )


def _objective(entry: Any, path: Path) -> Objective:
    if (
        not isinstance(entry, dict)
        or set(entry) != {"name", "direction", "unit"}
        or not isinstance(entry["name"], str)
        or entry["direction"] not in ("max", "min")
        or not isinstance(entry["unit"], str | None)
    ):
        raise _wrong(path, "an objective is damaged", "name, direction (max or min) and unit", entry)
    return Objective(entry["name"], entry["direction"], entry["unit"])


def _evaluation(entry: Any, number: int, objectives: Sequence[Objective], path: Path) -> Evaluation:
    place = f"evaluation {number}"
    if not isinstance(entry, dict) or set(entry) != {"sizes", "values", "seconds"}:
        raise _wrong(path, f"{place} is damaged", "sizes, values and seconds", entry)
    if not isinstance(entry["values"], dict):
        raise _wrong(path, f"{place} has no values", None, entry["values"])
    try:
        values = check_values(entry["values"], objectives, f"{path}, {place}")
    except SparseportError as error:
        raise _wrong(path, f"{place}: {error.what}", error.expected, error.found) from error
    return Evaluation(_sizes(entry["sizes"], place, path), values, _seconds(entry["seconds"], place, path))


def _known(entry: Any, known: set[Candidate], place: str, path: Path) -> Candidate:
    candidate = _sizes(entry, place, path)
    if candidate not in known:
        raise _wrong(path, f"{place} names a sub-network that was not evaluated", None, entry)
    return candidate


def _sizes(entry: Any, place: str, path: Path) -> Candidate:
    if not isinstance(entry, list) or not entry or any(type(size) is not int or size < 0 for size in entry):
        raise _wrong(path, f"{place} has no sizes", "a list of whole numbers", entry)
    return tuple(entry)


def _seconds(entry: Any, place: str, path: Path) -> float:
    if type(entry) not in (int, float) or not math.isfinite(entry) or entry < 0:
        raise _wrong(path, f"the seconds of {place} are no time", None, entry)
    return float(entry)


def _wrong(path: Path, what: str, expected: object, found: object) -> BadInput:
    return BadInput(
        f"the search result is damaged: {what}",
        where=path,
        expected=expected,
        found=None if found is None else repr(found)[:120],
        fix="run the search again: with its journal nothing is evaluated twice",
        code="E_RESULT",
    )
