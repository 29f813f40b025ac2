"""The share of good requests at several rates, seed by seed; the goodput that follows, and how sure it is.

Goodput is the rate at which 90 % of the requests of all seeds together are good. It is no mean over seeds, so
its interval is by the jackknife: what it would be without each seed in turn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from taichi_serve.search.goodput import TARGET
from taichi_serve.search.interval import Interval, student


@dataclass(frozen=True)
class Curve:
    """Rates (requests/s, rising), and at each of them the share of good requests of each seed; all seeds have
    as many requests."""

    rates: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len(self.shares[0])

    def share(self, at: int, without: int | None = None) -> float:
        """Of all seeds together, or of all but one, at the rate with this number."""
        mine = self.shares[at]
        if without is None:
            return sum(mine) / len(mine)
        return (sum(mine) - mine[without]) / (len(mine) - 1)

    def certain(self, at: int, kept: bool) -> bool:
        """Whether the target is kept (or else missed) there whichever seed is left out."""
        left_out = range(self.seeds) if self.seeds > 1 else (None,)
        return all((self.share(at, without) >= TARGET) is kept for without in left_out)

    def goodput(self, without: int | None = None) -> float:
        """Where the share falls through the target, on the straight line between the two rates about it; the
        last rate where it never does, 0 where the first has missed already."""
        shares = [self.share(at, without) for at in range(len(self.rates))]
        if shares[0] < TARGET:
            return 0.0
        for (low, kept), (high, missed) in pairwise(zip(self.rates, shares, strict=True)):
            if missed < TARGET:
                return low + (high - low) * (kept - TARGET) / (kept - missed)
        return self.rates[-1]


def spread(curve: Curve) -> Interval:
    """The goodput with its 95 % interval."""
    return jackknife(curve.goodput, curve.seeds)


def lead(ours: Curve, theirs: Curve) -> Interval | None:
    """How far our goodput is above theirs, as a share of it, with the same seeds left out of both: the luck
    of a seed is in neither. None where theirs is 0."""
    if not all(theirs.goodput(without) for without in (None, *range(theirs.seeds))):
        return None
    return jackknife(lambda without: ours.goodput(without) / theirs.goodput(without) - 1, ours.seeds)


def jackknife(estimate: Callable[[int | None], float], seeds: int) -> Interval:
    """An estimate from all seeds, and from its values without each of them the 95 % interval; that is NaN
    with one seed."""
    whole = estimate(None)
    if seeds < 2:
        return Interval(whole, math.nan, seeds)
    pseudo = [seeds * whole - (seeds - 1) * estimate(without) for without in range(seeds)]
    half = student(seeds - 1) * statistics.stdev(pseudo) / math.sqrt(seeds)
    return Interval(whole, half, seeds)
