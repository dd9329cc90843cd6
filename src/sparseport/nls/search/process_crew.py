"""Workers of a search as processes on this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from sparseport.nls.search.answers import Answer, MakeEvaluator, Worker, pickled_for_workers
from sparseport.nls.search.candidates import Candidate

_PATIENCE = 5.0  # seconds that a process gets to end before it is killed


@dataclass(frozen=True, eq=False)
class _Process:
    process: Any
    connection: Connection


class ProcessCrew:
    """Spawned processes: they start clean, whatever threads or devices this process uses.

    Each of them computes with as many threads as its libraries choose; an evaluator that wants fewer sets that itself.
    """

    def __init__(self, make_evaluator: MakeEvaluator) -> None:
        pickled_for_workers(make_evaluator)  # the process pickles it once more, and too late for a refusal
        self._make_evaluator = make_evaluator
        self._alive: list[_Process] = []

    def hire(self) -> Hashable:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._make_evaluator), daemon=True)
        process.start()
        theirs.close()  # so that the other end is closed when the process ends
        self._alive.append(_Process(process, ours))
        return self._alive[-1]

    def give(self, worker: Hashable, candidate: Candidate) -> None:
        assert isinstance(worker, _Process)
        with contextlib.suppress(OSError):  # it died meanwhile: wait() sees that
            worker.connection.send(candidate)

    def wait(self, busy: Sequence[Hashable]) -> tuple[Hashable, Answer | str]:
        workers = [worker for worker in busy if isinstance(worker, _Process)]
        # The sentinel is ready when the process has died. The connection alone would not do: a process that the
        # evaluator started may hold its other end open.
        ready = set(wait([end for worker in workers for end in (worker.connection, worker.process.sentinel)]))
        worker = next(w for w in workers if w.connection in ready or w.process.sentinel in ready)
        try:
            if not worker.connection.poll():  # it died, and its last words were not an answer
                raise EOFError
            answer = worker.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return worker, self._bury(worker)
        assert isinstance(answer, Answer)
        return worker, answer

    def close(self) -> None:
        for worker in self._alive:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._alive:
            worker.process.join(_PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._alive = []

    def _bury(self, worker: _Process) -> str:
        """Take a dead process off the list; says how it died."""
        self._alive.remove(worker)
        worker.connection.close()
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():  # it closed its end and goes on: no answer can come from it
            worker.process.kill()
            worker.process.join()
        status = worker.process.exitcode
        if status >= 0:
            return f"the process ended with status {status}"
        try:
            return f"the process was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"the process was ended by signal {-status}"


def _serve(connection: Connection, make_evaluator: MakeEvaluator) -> None:
    """A worker process: answer until the other end is closed."""
    # Ctrl-C goes to every process of the terminal; the one that started us ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries print; standard output belongs to the results of the command.
    os.dup2(2, 1)
    worker = Worker(make_evaluator)
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(worker.answer(connection.recv()))
