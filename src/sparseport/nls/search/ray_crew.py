"""Workers of a search as actors of Ray, on this machine or on a cluster."""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Hashable, Sequence
from typing import Any

from sparseport.errors import UsageError
from sparseport.nls.search.answers import Answer, MakeEvaluator, Worker, pickled_for_workers
from sparseport.nls.search.candidates import Candidate
from sparseport.ray_cluster import connected


class _Actor(Worker):
    """A worker that finds modules where the process that started it does, as a spawned process does too."""

    def __init__(self, pickled: bytes, paths: list[str]) -> None:
        sys.path.extend(path for path in paths if path not in sys.path)
        # Unpickled within an answer: what goes wrong then is told as what goes wrong in an evaluation.
        super().__init__(lambda: pickle.loads(pickled)())


class RayCrew:
    """Ray actors. Connects to the Ray that runs on this machine or that RAY_ADDRESS names; otherwise starts one.

    What is started listens on the loopback interface only, without dashboard and usage statistics, and ends with the
    search.
    On a cluster every machine needs this package and the files that the evaluator opens, at the same paths.
    """

    def __init__(self, make_evaluator: MakeEvaluator, workers: int, gpus: float) -> None:
        pickled = pickled_for_workers(make_evaluator)
        self._actors: set[Any] = set()
        self._pending: dict[Any, Any] = {}
        self._undo = contextlib.ExitStack()
        try:
            self._ray = self._undo.enter_context(connected(workers))
            self._check_room(workers, gpus)
        except BaseException:
            self.close()
            raise
        self._arguments = (pickled, list(sys.path))
        self._actor = self._ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Actor)

    def hire(self) -> Hashable:
        actor: Hashable = self._actor.remote(*self._arguments)
        self._actors.add(actor)
        return actor

    def give(self, worker: Hashable, candidate: Candidate) -> None:
        self._pending[worker] = worker.answer.remote(candidate)  # type: ignore[attr-defined]

    def wait(self, busy: Sequence[Hashable]) -> tuple[Hashable, Answer | str]:
        answers = {self._pending[worker]: worker for worker in busy}
        (ready, *_), _ = self._ray.wait(list(answers), num_returns=1)
        worker = answers[ready]
        del self._pending[worker]
        try:
            return worker, self._ray.get(ready)
        except self._ray.exceptions.RayTaskError:
            raise  # a defect of ours: Worker.answer returns what goes wrong in an evaluator
        except self._ray.exceptions.RayError as error:
            self._actors.discard(worker)
            with contextlib.suppress(Exception):
                self._ray.kill(worker)
            return worker, f"the Ray actor was lost: {type(error).__name__}, {' '.join(str(error).split())[:200]}"

    def close(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):  # gone already
                self._ray.kill(actor)
        self._actors = set()
        self._undo.close()

    def _check_room(self, workers: int, gpus: float) -> None:
        """An actor that Ray has no room for would wait for ever, with a sub-network in its hands."""
        room = self._ray.cluster_resources()
        for name, each in (("CPU", 1.0), ("GPU", gpus)):
            if each * workers > room.get(name, 0.0) + 1e-9:
                raise UsageError(
                    f"the Ray cluster has no room for {workers} workers",
                    expected=f"at most {int(room.get(name, 0.0) / each)} workers of {each:g} {name}",
                    found=workers,
                    fix="lower workers, or add machines to the cluster",
                )
