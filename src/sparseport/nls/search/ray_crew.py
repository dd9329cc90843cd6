"""Workers of a search as actors of Ray, on this machine or on a cluster."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from sparseport.errors import EnvironmentProblem, UsageError
from sparseport.extras import require_packages
from sparseport.nls.search.answers import Answer, MakeEvaluator, Worker, pickled_for_workers
from sparseport.nls.search.candidates import Candidate

# The smallest object store that Ray starts with is 75 MiB; sub-networks and their values are a few bytes.
_OBJECT_STORE_BYTES = 80 << 20


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
        require_packages(["distributed"])
        pickled = pickled_for_workers(make_evaluator)
        # Ray reads them when it is imported, and its processes inherit them.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray

        self._ray = ray
        self._ours = not ray.is_initialized()
        self._actors: set[Any] = set()
        self._pending: dict[Any, Any] = {}
        self._undo = contextlib.ExitStack()
        try:
            if self._ours:
                self._start(workers)
            self._check_room(workers, gpus)
        except BaseException:
            self.close()
            raise
        self._arguments = (pickled, list(sys.path))
        self._actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Actor)

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
        if self._ours:
            self._ray.shutdown()
        self._undo.close()

    def _start(self, workers: int) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        # Ray tells on standard output of workers that died, whatever log_to_driver says; that is ours for results.
        self._undo.enter_context(_switched("ray._private.worker", "_worker_logs_enabled", False))
        try:
            self._ray.init(address="auto", **quiet)
            return
        except ConnectionError as error:
            if "RAY_ADDRESS" in os.environ:
                raise EnvironmentProblem(
                    "cannot reach the Ray cluster that RAY_ADDRESS names",
                    where=os.environ["RAY_ADDRESS"],
                    found=str(error).splitlines()[0][:120],
                    fix="start it, or unset RAY_ADDRESS to use this machine",
                ) from error
        # A folder of its own, so that no other process takes this Ray for one that is there for all. Sockets lie in
        # it, whose paths may have some 100 characters: a user's own temporary folder can be too deep.
        folder = tempfile.mkdtemp(prefix="sparseport-ray-", dir="/tmp" if os.name == "posix" else None)
        self._undo.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            # On Linux, Ray has no public way to listen on 127.0.0.1 only, as it does on macOS and Windows.
            with _switched("ray._private.ray_constants", "ENABLE_RAY_CLUSTER", False):
                self._ray.init(
                    address="local",
                    num_cpus=workers,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    _temp_dir=folder,
                    **quiet,
                )
        except Exception as error:
            raise EnvironmentProblem(
                "Ray does not start on this machine",
                found=(str(error).splitlines() or [type(error).__name__])[0][:120],
                fix="use backend processes",
            ) from error

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


@contextlib.contextmanager
def _switched(module: str, name: str, value: object) -> Iterator[None]:
    """Give a variable of a module another value for the length of the block; one that is not there stays away."""
    holder = importlib.import_module(module)
    if not hasattr(holder, name):
        yield
        return
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
