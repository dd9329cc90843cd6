"""Greedy generation over a session of `sparseport.verify.sessions`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sparseport.bench.engines import Timing
from sparseport.verify.sessions import Session


class SessionRunner:
    """Reads a prompt in one go, then feeds the most likely token back, one at a time."""

    def __init__(self, session: Session, vocabulary: int) -> None:
        self._session = session
        self.vocabulary = vocabulary

    def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
        """See `sparseport.bench.engines.Runner`."""
        self._session.reset()
        started = time.perf_counter()
        token = int(self._session.read(prompt)[-1].argmax())
        first = time.perf_counter()
        for _ in range(tokens - 1):
            token = int(self._session.read([token])[-1].argmax())
        return Timing(first - started, time.perf_counter() - first, tokens)
