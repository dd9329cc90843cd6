"""Run a heavy step in a process of its own, so that the exporter stays small while torch and optimum load elsewhere.

The child prints one JSON line: `{"ok": ...}` or `{"error": {...}}`. Its standard error is shown only if it dies without
one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

from sparseport import errors
from sparseport.errors import EnvironmentProblem, SparseportError
from sparseport.offline import go_offline, go_quiet

_LESS_MEMORY = "`--no-numerics` skips the comparison; `--dry-run` shows the estimate"
# Signals that a defect in a library sends; any other signal comes from outside, from the kernel when memory runs out.
_CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")


class Child:
    """A running step; `result()` waits for it and returns what it printed.

    Args:
        module: serves the step when it is run.
        request: the step's arguments.
        environment: variables for the child; this process's own if None.
        show_errors: let its standard error through, for steps that report their own progress there.
    """

    def __init__(
        self,
        module: str,
        request: dict[str, Any],
        environment: dict[str, str] | None = None,
        show_errors: bool = False,
    ) -> None:
        env = {**(os.environ if environment is None else environment), "PYTHONWARNINGS": "ignore"}
        self.module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if show_errors else subprocess.PIPE,
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

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait, for `timeout` seconds at most, and return the child's answer.

        Raises:
            SparseportError: what the child raised, of the same class; exit status 70 if it was no error of ours.
            EnvironmentProblem: memory ran out, a package is missing, the child died without an answer, or
                (E_TIMEOUT) it has not answered yet; it is killed at the end of the `with` block.
        """
        try:
            out, err = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise EnvironmentProblem(
                f"step {self.module} gave no answer within {timeout:g} s", code="E_TIMEOUT"
            ) from error
        lines = [line for line in out.splitlines() if line.startswith("{")]
        if not lines:
            raise _death(self.module, self._process.returncode, err or "")
        answer: dict[str, Any] = json.loads(lines[-1])
        if "error" in answer:
            raise _rebuild(answer["error"]) from _ChildTraceback(answer["traceback"])
        return dict(answer["ok"])


class _ChildTraceback(Exception):
    """Where the child failed; Python prints it above the parent's own traceback (`--debug`)."""

    def __str__(self) -> str:
        return f"in the child process\n{self.args[0]}"


def serve(step: Callable[..., dict[str, Any]], online: bool = False) -> None:
    """The child's main: read the request from standard input, run `step(**request)`, print the answer.

    `online` is for the one step that may reach a hub; telemetry is off there as well.
    """
    if online:
        go_quiet()
    else:
        go_offline()
    request = json.load(sys.stdin)
    # Libraries print banners; only our one line may reach the parent.
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        answer = json.dumps({"ok": step(**request)})
    except Exception as error:
        problem = _as_ours(error, step.__name__)
        fields = {**problem.as_dict(), "class": type(problem).__name__}
        answer = json.dumps({"error": fields, "traceback": traceback.format_exc()})
    print(answer, file=answer_to, flush=True)


def _as_ours(error: Exception, step: str) -> SparseportError:
    """What the parent raises for an exception of the step."""
    if isinstance(error, SparseportError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return EnvironmentProblem(
            "a package is missing", where=error.name, fix="pip install 'sparseport[openvino,onnx]'"
        )
    # torch has no class of its own for a host allocation that fails.
    no_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    if no_memory or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return EnvironmentProblem(f"out of memory in step {step}", code="E_MEM", fix=_LESS_MEMORY)
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return SparseportError(f"step {step} failed: {text}", fix="run again with --debug")


def _death(module: str, status: int, err: str) -> EnvironmentProblem:
    """The error for a child that printed no answer."""
    tail = " | ".join(err.strip().splitlines()[-3:]) or None
    look = "look at free memory and at `pip check`"
    if status >= 0:
        return EnvironmentProblem(f"step {module} died without an answer (status {status})", found=tail, fix=look)
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    if name in _CRASHES:
        return EnvironmentProblem(f"step {module} crashed ({name})", found=tail, fix=look)
    return EnvironmentProblem(
        f"step {module} was killed ({name}), most often because memory ran out", code="E_MEM", fix=_LESS_MEMORY
    )


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
