"""From measured values to places in a plot, and the ticks of its axes.

Places are percent of the plot's width or height: a browser stretches them, while lines and letters keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """Values from `low` to `high`."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """Percent of the way, kept inside."""
        if self.high <= self.low:
            return 50.0
        return min(100.0, max(0.0, 100 * (value - self.low) / (self.high - self.low)))

    def ticks(self, about: int = 5) -> list[float]:
        """Values 1, 2 or 5 times a power of ten apart."""
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        raw = span / about
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Decades:
    """Positive values on a logarithmic axis from 10**low to 10**high; what is smaller stands at its start."""

    low: int
    high: int

    def place(self, value: float) -> float:
        """Percent of the way, kept inside."""
        if value <= 0:
            return 0.0
        return min(100.0, max(0.0, 100 * (math.log10(value) - self.low) / (self.high - self.low)))

    def ticks(self, about: int = 5) -> list[int]:
        """Exponents, so many that their names do not touch."""
        step = max(1, -(-(self.high - self.low) // about))
        return list(range(self.low, self.high + 1, step))


def around(values: Iterable[float], margin: float = 0.08) -> Linear:
    """An axis around values, with some room at both ends."""
    found = list(values)
    low, high = min(found), max(found)
    room = (high - low) * margin or abs(high) * margin or 1.0
    return Linear(low - room, high + room)


def decades(values: Iterable[float]) -> Decades:
    """A logarithmic axis for values; two decades at least."""
    exponents = [math.log10(value) for value in values if value > 0] or [0.0]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    return Decades(low, max(high, low + 2))


def at(place: float) -> str:
    """A place as an attribute of SVG."""
    return f"{place:.2f}%"
