"""95 % intervals over seeds, by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """An estimate, half of its 95 % interval (NaN with one seed), and over how many seeds."""

    mean: float
    half: float
    seeds: int

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half


def student(freedom: int) -> float:
    """The quantile of Student's t that 2.5 % lie above; within 0.001 beyond 30 degrees of freedom."""
    return T[freedom - 1] if freedom <= len(T) else 1.96 + 2.42 / freedom


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of one value a seed; ValueError without any."""
    if not values:
        raise ValueError("an interval needs at least one value")
    seeds = len(values)
    if seeds == 1:
        return Interval(values[0], math.nan, 1)
    half = student(seeds - 1) * statistics.stdev(values) / math.sqrt(seeds)
    return Interval(statistics.fmean(values), half, seeds)
