"""One worker's side of a search: it makes its evaluator once and answers for one sub-network after another."""

from __future__ import annotations

import errno
import pickle
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from sparseport.errors import EnvironmentProblem, SparseportError, UsageError
from sparseport.nls.search.candidates import Candidate

Evaluator: TypeAlias = Callable[[Candidate], Mapping[str, float]]
"""Measures one sub-network: objective -> value. Equal sub-networks have to give equal values in every process."""

MakeEvaluator: TypeAlias = Callable[[], Evaluator]
"""Makes an evaluator in the process that will use it; for other processes it has to be picklable."""


@dataclass(frozen=True)
class Answer:
    """What became of one evaluation.

    values     what the evaluator returned; None if it failed
    seconds    time that it took, without making the evaluator
    error      why it failed, None if it did not
    traceback  where it failed
    """

    values: dict[str, float] | None = None
    seconds: float = 0.0
    error: SparseportError | None = None
    traceback: str = ""


class Worker:
    """Holds an evaluator, which it makes when the first sub-network comes."""

    def __init__(self, make_evaluator: MakeEvaluator) -> None:
        self._make_evaluator = make_evaluator
        self._evaluator: Evaluator | None = None

    def answer(self, candidate: Candidate) -> Answer:
        """Evaluate; every failure becomes an answer, so that it crosses processes whole."""
        try:
            if self._evaluator is None:
                self._evaluator = self._make_evaluator()
            started = time.perf_counter()
            values = dict(self._evaluator(candidate))
            return Answer(values, time.perf_counter() - started)
        except Exception as error:
            return Answer(error=_as_ours(error), traceback=traceback.format_exc())


def pickled_for_workers(make_evaluator: MakeEvaluator) -> bytes:
    """The pickle that takes an evaluator's maker to another process.

    Raises:
        UsageError: it cannot be pickled.
    """
    try:
        return pickle.dumps(make_evaluator)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            "the evaluator cannot be sent to another process",
            found=str(error).splitlines()[0][:120],
            fix="use backend local, or make the evaluator with a function or class of a module",
        ) from error


def _as_ours(error: Exception) -> SparseportError:
    """What the search raises for an exception of the evaluator."""
    if isinstance(error, SparseportError):
        return error
    first = (str(error).strip().splitlines() or [""])[0]
    # torch has no class of its own for a host allocation that fails.
    no_memory = isinstance(error, MemoryError) or "out of memory" in first or "can't allocate memory" in first
    if no_memory or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return EnvironmentProblem("out of memory in an evaluation", code="E_MEM", fix="use fewer workers")
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return SparseportError(f"the evaluation failed: {text}", fix="run again with --debug")
