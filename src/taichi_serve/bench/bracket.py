"""Bisection for the highest rate that keeps a target: what is known so far, and which rate to try next.

It knows nothing of requests: a rate either kept the target or missed it. Rates are compared by their ratio,
because what a rate costs in attainment depends on its share of what the server can do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

REACH = 64.0  # the search looks from `start` / 64 up to `start` * 64


def wider(step: float) -> float:
    """The step after this one, where the search goes on in the same direction."""
    return min(2.0, step**2)


@dataclass(frozen=True, slots=True)
class Bracket:
    """`low` is the highest rate that kept the target, 0 for none; `high` the lowest that missed it."""

    start: float
    tolerance: float = 0.1  # the search is over when `high` is at most this share above `low`
    low: float = 0.0
    high: float = math.inf
    step: float = 2.0  # from `start` to the next rate, and squared with every further one, up to 2

    def __post_init__(self) -> None:
        if not 1 < self.step <= 2:
            raise ValueError(f"step must be above 1 and at most 2, not {self.step!r}")
        for name in ("start", "tolerance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, not {value!r}")

    def next(self) -> float | None:
        """The rate to try (requests/s); None when it is known well enough, or beyond reach."""
        if self.low and self.high < math.inf:
            near = self.high <= self.low * (1 + self.tolerance)
            return None if near else math.sqrt(self.low * self.high)
        if self.low:
            return self.low * self.step if self.low < self.start * REACH else None
        if self.high < math.inf:
            return self.high / self.step if self.high > self.start / REACH else None
        return self.start

    def after(self, rate: float, kept: bool) -> Bracket:
        """What is known when this rate has been tried."""
        known = self if rate == self.start else replace(self, step=wider(self.step))
        if kept:
            return replace(known, low=max(self.low, rate))
        return replace(known, high=min(self.high, rate))
