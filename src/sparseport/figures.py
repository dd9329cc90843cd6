"""Samples to medians with ranges: how a result has them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest, and the samples themselves in the order of the rounds.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("no samples")
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": list(samples),
    }


def paired_ratio(own: Sequence[float], first: Sequence[float]) -> float:
    """Median over the rounds of this row's time by the first row's in the same round; below 1 is faster.

    What slows a machine down for a while slows both, so that ratios are steadier than the times.
    """
    return statistics.median(a / b for a, b in zip(own, first, strict=True))
