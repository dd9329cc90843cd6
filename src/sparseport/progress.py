"""Progress of long steps, on standard error: bars on a terminal, JSON lines elsewhere, nothing when quiet."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparseport.errors import printable

Step = Callable[[], None]
"""Call it once for each unit of work done."""


class Progress:
    """Reports steps of a job.

    style  "auto" (bars on a terminal, JSON lines otherwise), "bars", "json" or "quiet".
    """

    def __init__(self, style: str = "auto") -> None:
        if style == "auto":
            style = "bars" if sys.stderr.isatty() else "json"
        self.style = style

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Step]:
        """Report one step of `total` units (None: of unknown length); yields the function that counts a unit."""
        started = time.monotonic()
        if self.style == "bars":
            with _bar(label, total) as step:
                yield step
            return
        self._line({"step": label, "state": "start", "total": total})
        done = 0
        reported = 0

        def count() -> None:
            nonlocal done, reported
            done += 1
            if total and done * 10 // total > reported:
                reported = done * 10 // total
                self._line({"step": label, "done": done, "total": total})

        yield count
        self._line({"step": label, "state": "end", "seconds": round(time.monotonic() - started, 1)})

    def note(self, message: str) -> None:
        """Say something worth knowing once (a warning, a choice that was made)."""
        if self.style == "bars":
            print(printable(message), file=sys.stderr)
        else:
            self._line({"note": message})

    def _line(self, fields: dict[str, object]) -> None:
        if self.style != "json":
            return
        try:
            print(json.dumps(fields), file=sys.stderr, flush=True)
        except BrokenPipeError:
            # Whoever read the progress went away; the job itself goes on.
            sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


@contextmanager
def _bar(label: str, total: int | None) -> Iterator[Step]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = [SpinnerColumn(), TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn()]
    with RichProgress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)
        if total is None:
            progress.update(task, total=1, completed=1)
