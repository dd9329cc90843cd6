"""The fastest settings of a folder on this machine, among those that stay within a budget of drift.

Speed and drift are measured together: settings that quantise activations are faster because they compute something
else, and how far that is from the model that was trained depends on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sparseport.bench.knobs import NUMERIC, Settings, Stage, combinations
from sparseport.bench.rounds import Asked, Samples, measure_rounds
from sparseport.bench.subjects import Contender
from sparseport.errors import SparseportError, UsageError
from sparseport.figures import paired_ratio

Prefer = Literal["decode", "prefill"]
Drift = dict[str, float]

_FIGURE = {"decode": "decode_ms", "prefill": "first_token_ms"}
# Rounds of a stage: enough to tell settings apart that are worth it, few enough to try many.
_STAGE_ROUNDS = 2
# Settings have to be at least this much faster than the engine's own, or those stay: less is noise.
_WORTH_IT = 0.98


@dataclass(frozen=True)
class Budget:
    """How far logits may be from the dequantised model's.

    kl    mean KL divergence in nats, at most
    top1  share of positions with the same most likely token, at least
    """

    kl: float
    top1: float

    def allows(self, drift: Drift) -> bool:
        """Whether a measured drift is within it."""
        return drift["kl"] <= self.kl and drift["top1"] >= self.top1

    def check(self) -> None:
        """Refuse a budget that means nothing.

        Raises:
            UsageError: a bound is out of range.
        """
        if not self.kl >= 0 or not 0 <= self.top1 <= 1:
            raise UsageError("no such budget", expected="KL of 0 or more, top-1 of 0 to 1", found=self)


@dataclass
class Tried:
    """Settings that were tried: what they drift, and what was measured unless that was too much."""

    settings: Settings
    drift: Drift | None
    within: bool
    runs: list[dict[str, Any]]
    failed: str | None = None


def sweep(
    row: Contender,
    stages: Sequence[Stage],
    budget: Budget,
    asked: Asked,
    drift_of: Callable[[Contender], Drift],
    *,
    prefer: Prefer = "decode",
    measure: Callable[[Contender, Asked, int], dict[str, Any]] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[list[Tried], Settings | None]:
    """Try settings stage by stage.

    Args:
        row: the folder and its engine, without settings.
        stages: what to try; see `sparseport.bench.knobs`.
        budget: settings that drift more are not measured.
        asked: how; stages take fewer rounds.
        drift_of: measures the drift of a row.
        prefer: what has to be fast.
        measure: for tests.
        on_step: called after each measurement.

    Returns:
        Everything that was tried, in its order, and the fastest settings: an empty dictionary for the engine's own,
        None if no settings are within the budget.
    """
    budget.check()
    figure = _FIGURE[prefer]
    drifts: dict[str, Drift] = {}

    def drift(settings: Settings) -> Drift:
        key = repr(sorted((name, str(value)) for name, value in settings.items() if name in NUMERIC))
        if key not in drifts:
            drifts[key] = drift_of(replace(row, settings=settings))
        return drifts[key]

    def candidate(settings: Settings) -> Tried:
        try:
            found = drift(settings)
        except SparseportError as error:  # a plugin that does not take them
            return Tried(settings, None, False, [], str(error))
        return Tried(settings, found, budget.allows(found), [])

    tried: list[Tried] = []
    best: Settings | None = None
    for stage in stages:
        start = best or {}
        candidates = [candidate(settings) for settings in combinations(stage, start)]
        inside = [one for one in candidates if one.within]
        rows = [replace(row, settings=one.settings) for one in inside]
        stage_asked = replace(asked, rounds=min(asked.rounds, _STAGE_ROUNDS))
        for one, samples in zip(inside, measure_rounds(rows, stage_asked, on_step, measure), strict=True):
            one.runs, one.failed = samples.runs, str(samples.failed) if samples.failed else None
        tried += candidates
        good = [one for one in inside if one.failed is None]
        if good:
            best = _best(good, figure).settings
        elif best is None:
            break  # no value of a later setting brings drift back
    return tried, best


def _best(good: Sequence[Tried], figure: str) -> Tried:
    """The fastest; the stage's start if nothing is so much faster that noise is not the likelier reason."""
    fastest = min(good, key=lambda one: _total(one, figure))
    start = good[0]
    return fastest if _total(fastest, figure) <= _WORTH_IT * _total(start, figure) else start


def _total(one: Tried, figure: str) -> float:
    return float(sum(run[figure] for run in one.runs))


def faster(chosen: Samples, default: Samples, prefer: Prefer) -> bool:
    """Whether settings were worth it in the rounds that were measured side by side."""
    name = _FIGURE[prefer]
    ratio = paired_ratio([run[name] for run in chosen.runs], [run[name] for run in default.runs])
    return ratio <= _WORTH_IT
