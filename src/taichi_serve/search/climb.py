"""Goodput of contenders over several seeds: the rate at which 90 % of all their requests are good.

A bisection over the rate for each contender (bench/bracket.py), with the same requests at every rate and for
all contenders. It goes up for as long as the target is kept, far beyond the bound: a run that still keeps it
there is too short to say more than "at least".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from taichi_serve.bench.bracket import Bracket
from taichi_serve.bench.goodput import Histogram, Tally
from taichi_serve.search.crew import Workers
from taichi_serve.search.curve import Curve
from taichi_serve.search.goodput import TARGET, Contender

STEP = 1.04  # from a guess to the rate after it; further steps are larger
WIDEST = 1.5  # no rate is tried beyond so many times the bracket for the sake of single seeds
OTHER = "first_at", "last_at", "classes"  # of a tally: no counts


@dataclass(frozen=True)
class Reached:
    """The shares of good requests that were seen, and the runs at the highest rate that kept the target."""

    curve: Curve
    tally: Tally | None

    @property
    def rate(self) -> float:
        """The goodput (requests/s)."""
        return self.curve.goodput()


@dataclass
class Climb:
    """A bisection under way: one writer, `climb`."""

    contender: Contender
    bracket: Bracket
    most: float  # requests/s
    runs: dict[float, list[Tally]] = field(default_factory=dict)

    def next(self) -> float | None:
        """The rate to try: of the bisection, then one on either side of it from which the goodput without any
        one seed can be read as well; None when all is known."""
        rate, bracket = self.bracket.next(), self.bracket
        if bracket.low >= self.most:
            return None
        if rate is not None or not bracket.low or bracket.high == math.inf:
            return min(rate, self.most) if rate is not None else None
        curve = self.curve()
        if not curve.certain(0, kept=True) and curve.rates[0] > bracket.low / WIDEST:
            return curve.rates[0] / STEP
        if not curve.certain(-1, kept=False) and curve.rates[-1] < bracket.high * WIDEST:
            return curve.rates[-1] * STEP
        return None

    def took(self, rate: float, runs: list[Tally]) -> None:
        """The runs at a rate are over, one for each seed."""
        self.runs[rate] = runs
        share = sum(run.attainment for run in runs) / len(runs)
        self.bracket = self.bracket.after(rate, share >= TARGET)

    def curve(self) -> Curve:
        """What was seen so far."""
        rates = sorted(self.runs)
        shares = (tuple(run.attainment for run in self.runs[rate]) for rate in rates)
        return Curve(tuple(rates), tuple(shares))

    def reached(self) -> Reached:
        """What came of it."""
        low = self.bracket.low
        return Reached(self.curve(), together(self.runs[low]) if low else None)


def climb(
    crew: Workers,
    field_: Sequence[tuple[Contender, float]],
    requests: int,
    seeds: Sequence[int],
    tolerance: float,
    most: float,
) -> list[Reached]:
    """Of contenders with a guess (requests/s) each; a guess that is wrong costs some runs and nothing else.
    Nothing is tried above `most` requests/s.

    All go on in step, so that there is work for every process."""
    climbs = [Climb(c, Bracket(min(guess, most), tolerance, step=STEP), most) for c, guess in field_]
    while tries := [(one, rate) for one in climbs if (rate := one.next()) is not None]:
        runs = crew.attain_all((one.contender, rate, requests, s) for one, rate in tries for s in seeds)
        for number, (one, rate) in enumerate(tries):
            one.took(rate, runs[number * len(seeds) : (number + 1) * len(seeds)])
    return [one.reached() for one in climbs]


def together(runs: Sequence[Tally]) -> Tally:
    """Several runs as if they had followed each other: whatever they count is added."""
    whole = Tally()
    for run in runs:
        for name in (one.name for one in fields(Tally) if one.name not in OTHER):
            ours, theirs = getattr(whole, name), getattr(run, name)
            if isinstance(ours, Histogram):
                _join(ours, theirs)
            elif isinstance(ours, dict):
                _add(ours, theirs)
            else:
                setattr(whole, name, ours + theirs)
        whole.last_at += run.last_at - run.first_at
    for name in dict.fromkeys(name for run in runs for name in run.classes):
        whole.classes[name] = together([run.classes[name] for run in runs if name in run.classes])
    return whole


def _join(into: Histogram, other: Histogram) -> None:
    into.count += other.count
    into.total += other.total
    into.most = max(into.most, other.most)
    _add(into.buckets, other.buckets)


def _add(into: dict[Any, Any], other: dict[Any, Any]) -> None:
    for key, number in other.items():
        into[key] = into[key] + number if key in into else number
