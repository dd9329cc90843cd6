"""Runs the code that `checkpoints.pickles` gives to a child process in the test's own process."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys


class InProcess:
    """Stands for `subprocess` and runs the child's code here: torch loads once, not in every test."""

    TimeoutExpired = subprocess.TimeoutExpired

    @staticmethod
    def run(command, **_):
        out, err, status, kept = io.StringIO(), "", 0, sys.argv
        sys.argv = ["-c", *command[4:]]
        try:
            with contextlib.redirect_stdout(out):
                exec(command[3], {})
        except SystemExit as error:
            err, status = str(error), 1
        except Exception as error:
            err, status = f"{type(error).__name__}: {error}", 1
        finally:
            sys.argv = kept
        return subprocess.CompletedProcess(command, status, out.getvalue(), err)
