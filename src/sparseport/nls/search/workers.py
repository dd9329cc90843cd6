"""Evaluate many sub-networks: in this process, in several, or on a Ray cluster; a worker that is lost is replaced."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

from sparseport.errors import EnvironmentProblem, SparseportError
from sparseport.nls.search.answers import Answer, MakeEvaluator, Worker
from sparseport.nls.search.candidates import Candidate, label_of
from sparseport.nls.search.objectives import Evaluation


class Crew(Protocol):
    """Workers of one kind. A worker has one sub-network at a time."""

    def hire(self) -> Hashable:
        """Start a worker and return its handle."""

    def give(self, worker: Hashable, candidate: Candidate) -> None:
        """Let a worker evaluate; returns at once."""

    def wait(self, busy: Sequence[Hashable]) -> tuple[Hashable, Answer | str]:
        """Wait for one of the workers: it and its answer, or how it died."""

    def close(self) -> None:
        """End all workers."""


class Team:
    """Workers that stay from one batch of sub-networks to the next; made by `open_team`."""

    def __init__(self, crew: Crew, workers: int, retries: int) -> None:
        self._crew = crew
        self._workers = workers
        self._retries = retries
        self._idle: list[Hashable] = []

    def evaluate_all(self, candidates: Sequence[Candidate]) -> Iterator[Evaluation]:
        """Evaluations in the order in which they end.

        The values are as the evaluator returned them, unchecked.

        Raises:
            SparseportError: what the evaluator raised, of the same class, naming the sub-network; anything else that
                it raised as exit status 70.
            EnvironmentProblem: E_WORKER, a sub-network lost its worker once more than it may be retried.
        """
        waiting = deque((candidate, 0) for candidate in candidates)
        busy: dict[Hashable, tuple[Candidate, int]] = {}
        while waiting or busy:
            while waiting and len(busy) < self._workers:
                worker = self._idle.pop() if self._idle else self._crew.hire()
                busy[worker] = waiting.popleft()
                self._crew.give(worker, busy[worker][0])
            worker, answer = self._crew.wait(list(busy))
            candidate, lost = busy.pop(worker)
            if isinstance(answer, str):
                if lost >= self._retries:
                    raise EnvironmentProblem(
                        f"an evaluation lost its worker {lost + 1} times",
                        where=label_of(candidate),
                        found=answer,
                        fix="look at free memory, or use fewer workers; what was evaluated is in the journal",
                        code="E_WORKER",
                    )
                waiting.appendleft((candidate, lost + 1))
                continue
            self._idle.append(worker)
            if answer.error is not None:
                raise _named(answer.error, candidate) from _WorkerTraceback(answer.traceback)
            assert answer.values is not None
            yield Evaluation(candidate, answer.values, answer.seconds)


@contextmanager
def open_team(
    make_evaluator: MakeEvaluator,
    *,
    backend: Literal["local", "processes", "ray"] = "local",
    workers: int = 1,
    retries: int = 2,
    gpus: float = 0.0,
) -> Iterator[Team]:
    """Workers that each make their evaluator once, when they get their first sub-network; they end with the block.

    Args:
        make_evaluator: makes an evaluator; called in the worker.
        backend: local is this process; processes are new ones on this machine; ray are actors of the Ray that runs
            already, or of one that is started for this search.
        workers: at most so many at once; started as they are needed.
        retries: how often a sub-network is evaluated again whose worker died.
        gpus: of each Ray worker; a share of one is fine.

    Raises:
        UsageError: more than one local worker, more Ray workers than the cluster has room for, or an evaluator that
            cannot be sent to another process.
        EnvironmentProblem: ray is asked for and not installed, or does not start.
    """
    crew = _crew(make_evaluator, backend, workers, gpus)
    try:
        yield Team(crew, workers, retries)
    finally:
        crew.close()


def _crew(make_evaluator: MakeEvaluator, backend: str, workers: int, gpus: float) -> Crew:
    if backend == "local":
        return _Local(make_evaluator)
    if backend == "processes":
        from sparseport.nls.search.process_crew import ProcessCrew

        return ProcessCrew(make_evaluator)
    from sparseport.nls.search.ray_crew import RayCrew

    return RayCrew(make_evaluator, workers, gpus)


class _Local:
    """This process as the only worker."""

    def __init__(self, make_evaluator: MakeEvaluator) -> None:
        self._worker = Worker(make_evaluator)
        self._candidate: Candidate = ()

    def hire(self) -> Hashable:
        return self._worker

    def give(self, worker: Hashable, candidate: Candidate) -> None:
        self._candidate = candidate

    def wait(self, busy: Sequence[Hashable]) -> tuple[Hashable, Answer | str]:
        return self._worker, self._worker.answer(self._candidate)

    def close(self) -> None:
        pass


class _WorkerTraceback(Exception):
    """Where the worker failed; Python prints it above our own traceback (`--debug`)."""

    def __str__(self) -> str:
        return f"in the worker\n{self.args[0]}"


def _named(error: SparseportError, candidate: Candidate) -> SparseportError:
    """The same error, with the sub-network in its place."""
    label = label_of(candidate)
    return type(error)(
        error.what,
        where=label if error.where is None else f"{label}: {error.where}",
        expected=error.expected,
        found=error.found,
        fix=error.fix,
        code=error.code,
    )
