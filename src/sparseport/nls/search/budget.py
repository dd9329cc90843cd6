"""How many evaluations a strategy may still ask for, and what it has asked for so far."""

from __future__ import annotations

from collections.abc import Iterable

from sparseport.nls.search.candidates import Candidate
from sparseport.nls.search.objectives import Evaluate, Evaluation


class Budget:
    """Evaluates each sub-network once, and no more of them than allowed.

    An evaluation counts when the strategy asks for it the first time, also where the journal answers: a resumed search
    walks the same way as one that was never interrupted.
    """

    def __init__(self, evaluate: Evaluate, evaluations: int) -> None:
        self._evaluate = evaluate
        self._evaluations = evaluations
        self.seen: dict[Candidate, Evaluation] = {}

    @property
    def left(self) -> int:
        """Evaluations that may still be asked for."""
        return self._evaluations - len(self.seen)

    def evaluate(self, candidates: Iterable[Candidate]) -> list[Evaluation]:
        """Evaluate those that are new, in their order, as far as the budget goes; returns the new evaluations."""
        fresh = [candidate for candidate in dict.fromkeys(candidates) if candidate not in self.seen][: self.left]
        found = self._evaluate(fresh) if fresh else []
        self.seen.update((evaluation.candidate, evaluation) for evaluation in found)
        return found

    def all(self) -> list[Evaluation]:
        """Everything that was asked for, in the order of asking."""
        return list(self.seen.values())
