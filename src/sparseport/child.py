"""Run a heavy step in a process of its own, so that the exporter stays small while torch and optimum load elsewhere.

The child prints one JSON line: `{"ok": ...}` or `{"error": {...}}`. Its standard error is shown only if it crashes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from sparseport import errors
from sparseport.errors import EnvironmentProblem, SparseportError
from sparseport.offline import go_offline


class Child:
    """A running step; `result()` waits for it and returns what it printed."""

    def __init__(self, module: str, request: dict[str, Any]) -> None:
        env = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self.module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            text=True,
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a child that died at once is reported by result()
            self._process.stdin.write(json.dumps(request))
            self._process.stdin.close()
        self._process.stdin = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def result(self) -> dict[str, Any]:
        """Wait and return the child's answer.

        Raises:
            SparseportError: what the child raised, of the same class.
            EnvironmentProblem: the child died without an answer (killed for memory, a missing package, a crash).
        """
        out, err = self._process.communicate()
        lines = [line for line in out.splitlines() if line.startswith("{")]
        if not lines:
            code = self._process.returncode
            tail = " | ".join(err.strip().splitlines()[-3:])
            raise EnvironmentProblem(
                f"step {self.module} died without an answer (status {code})",
                found=tail or None,
                fix="look at free memory and at `pip check`",
            )
        answer: dict[str, Any] = json.loads(lines[-1])
        if "error" in answer:
            raise _rebuild(answer["error"])
        return dict(answer["ok"])


def serve(step: Callable[..., dict[str, Any]]) -> None:
    """The child's main: read the request from standard input, run `step(**request)`, print the answer."""
    go_offline()
    request = json.load(sys.stdin)
    # Libraries print banners; only our one line may reach the parent.
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        answer = {"ok": step(**request)}
    except SparseportError as error:
        answer = {"error": {**error.as_dict(), "class": type(error).__name__}}
    except ModuleNotFoundError as error:
        problem = EnvironmentProblem("a package is missing", where=error.name, fix="pip install 'sparseport[openvino]'")
        answer = {"error": {**problem.as_dict(), "class": "EnvironmentProblem"}}
    print(json.dumps(answer), file=answer_to, flush=True)


def _rebuild(fields: dict[str, Any]) -> SparseportError:
    kind = getattr(errors, fields["class"], SparseportError)
    error: SparseportError = kind(
        fields["what"],
        where=fields["where"],
        expected=fields["expected"],
        found=fields["found"],
        fix=fields["fix"],
        code=fields["code"],
    )
    return error
