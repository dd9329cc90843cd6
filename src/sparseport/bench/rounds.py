"""All measurements in turns: every round measures every row once, each in a fresh process."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparseport.bench.subjects import Contender
from sparseport.child import Child
from sparseport.errors import SparseportError


@dataclass(frozen=True)
class Asked:
    """How everything is measured.

    prompt   tokens to read
    tokens   tokens to generate
    rounds   how often each row is measured
    warm_up  generations in each process before the one that counts
    threads  for each engine; 0 leaves it to them
    pinned   numbers of the processor's cores to stay on, or None
    """

    prompt: int = 64
    tokens: int = 64
    rounds: int = 5
    warm_up: int = 1
    threads: int = 0
    pinned: tuple[int, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a result."""
        pinned = None if self.pinned is None else list(self.pinned)
        return {**vars(self), "pinned": pinned}


@dataclass
class Samples:
    """What was measured of a row, a sample for each round; or why it cannot be measured."""

    contender: Contender
    runs: list[dict[str, Any]] = field(default_factory=list)
    failed: SparseportError | None = None


def measure_rounds(
    contenders: Sequence[Contender],
    asked: Asked,
    on_step: Callable[[], None] = lambda: None,
    measure: Callable[[Contender, Asked, int], dict[str, Any]] | None = None,
) -> list[Samples]:
    """Measure rows in interleaved rounds.

    The order within a round is another one each time: who runs after whom should not decide anything. A row that fails
    is left out of later rounds, and keeps its error.

    Args:
        contenders: the rows.
        asked: how.
        on_step: called after each measurement.
        measure: for tests; a process each by default.
    """
    measure = measure or in_process_of_its_own
    rows = [Samples(contender) for contender in contenders]
    shuffle = random.Random(0).shuffle
    for number in range(asked.rounds):
        order = list(rows)
        shuffle(order)
        for row in order:
            if row.failed is None:
                try:
                    row.runs.append(measure(row.contender, asked, number))
                except SparseportError as error:
                    row.failed = error
            on_step()
    return rows


def in_process_of_its_own(contender: Contender, asked: Asked, seed: int) -> dict[str, Any]:
    """One measurement by `sparseport.bench.worker`."""
    request = {
        "engine": contender.engine,
        "path": str(contender.subject.path),
        "device": contender.device,
        "settings": contender.settings,
        "prompt": asked.prompt,
        "tokens": asked.tokens,
        "warm_up": asked.warm_up,
        "threads": asked.threads,
        "pinned": None if asked.pinned is None else list(asked.pinned),
        "seed": seed,
    }
    with Child("sparseport.bench.worker", request) as child:
        return child.result()
