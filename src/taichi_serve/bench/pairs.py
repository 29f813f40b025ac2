"""What two contenders differ by, with its interval: requests at a rate that both saw, and their goodputs.

Two contenders get the same requests at the same times, so a request is a pair, and what is common to both (it
is long, it comes in a burst) falls out. Requests of a run are no independent draws: one that waits makes the
next ones wait. So what is drawn again, or counted as one, are blocks of consecutive requests.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from taichi_serve.bench.contest import Contest
from taichi_serve.bench.probe import drift
from taichi_serve.bench.score import DRIFT, Run

BLOCK = 20  # consecutive requests that count as one draw
LEAST_BLOCKS = 4  # below, nothing can be said of how requests hang together
DRAWS = 2000
Shares = NDArray[np.float64]
Outcomes = tuple[bool, ...]  # whether each counted request of a seed was good, in the order of sending


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more of the requests at one rate were good for the first of two, with its 95 % interval."""

    rate: float
    requests: int
    only_first: int  # good for the first and not for the second
    only_second: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Of the requests: above 0 where the first was better."""
        return (self.only_first - self.only_second) / self.requests


@dataclass(frozen=True, slots=True)
class Ratio:
    """The goodput of the first over that of the second, with its 95 % interval.

    `drift` is how much faster the machine was for the one than for the other, in the rounds that decided.
    """

    value: float
    low: float
    high: float
    drift: float = 0.0

    @property
    def verdict(self) -> str:
        """What can be said."""
        if self.drift > DRIFT:
            return f"open: the machine's speed differed by {self.drift:.0%}"
        if self.low > 1:
            return "ahead"
        return "behind" if self.high < 1 else "no difference seen"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two contenders; `ratio` is None where one of the goodputs is only a bound."""

    first: str
    second: str
    differences: tuple[Difference, ...]
    ratio: Ratio | None


def pairs(contest: Contest) -> list[Pair]:
    """Every two contenders, in the order of their names in the contest."""
    return [
        Pair(first, second, differences(contest, first, second), _ratio(contest, first, second))
        for first, second in combinations(contest.names, 2)
    ]


def outcomes(run: Run, warm_up: int) -> Outcomes:
    """Of one seed, seen to its end: whatever is not among its good samples was bad."""
    good = {sample.number for sample in run.samples if sample.good}
    return tuple(number in good for number in range(warm_up, warm_up + run.total))


# --------------------------------------------------------------------------------------- at a common rate


def differences(contest: Contest, first: str, second: str) -> tuple[Difference, ...]:
    """At every rate at which both were seen whole in the same rounds with every seed, the last of each."""
    last = {(r.rung, r.seed): r for r in contest.rounds if r.whole(first, second)}
    found: dict[int, list[list[int]]] = {}
    for (rung, _), done in sorted(last.items(), key=lambda item: item[0]):
        ours, theirs = (_outcomes(contest, done.run(name)) for name in (first, second))
        found.setdefault(rung, []).append([a - b for a, b in zip(ours, theirs, strict=True)])
    # Where only some seeds were seen whole, that they were may hang on what came of them.
    whole = {rung: series for rung, series in found.items() if len(series) == len(contest.trial.seeds)}
    return tuple(difference(contest.grid.rate(rung), series) for rung, series in whole.items())


def difference(rate: float, series: Sequence[Sequence[int]]) -> Difference:
    """From one series for each seed: 1 where a request was good for the first only, -1 for the second only.

    The interval is Bonett's and Price's for paired shares, which is honest where few requests differ. It is
    made wider by how much more the means of blocks vary than those of independent requests would.
    """
    each = [one for seed in series for one in seed]
    count, up, down = len(each), each.count(1), each.count(-1)
    p, q = (up + 1) / (count + 2), (down + 1) / (count + 2)
    spread, blocks = hanging_together(series)
    half = quantile(blocks - 1) * math.sqrt((p + q - (p - q) ** 2) / (count + 2) * spread)
    return Difference(rate, count, up, down, max(-1.0, p - q - half), min(1.0, p - q + half))


def hanging_together(series: Sequence[Sequence[int]]) -> tuple[float, int]:
    """By what factor (1 or more) the variance of the mean is that of independent requests, and from how many
    blocks that is known."""
    each = [one for seed in series for one in seed]
    means = [statistics.fmean(block) for seed in series for block in blocks_of(seed)]
    alone = statistics.pvariance(each)
    if len(means) < LEAST_BLOCKS or not alone:
        return 1.0, len(each)
    return max(1.0, statistics.variance(means) * BLOCK / alone), len(means)


def blocks_of(series: Sequence[int]) -> list[Sequence[int]]:
    """Whole blocks; a rest that is shorter is part of the last one."""
    count = max(1, len(series) // BLOCK)
    cuts = [number * BLOCK for number in range(count)] + [len(series)]
    return [series[a:b] for a, b in pairwise(cuts)]


def quantile(freedom: int) -> float:
    """Student's 97.5 % quantile (Cornish and Fisher, to 2 % from 4 degrees of freedom on, to 10 % from 3)."""
    z, n = 1.96, max(freedom, 1)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)


# ------------------------------------------------------------------------------------------ of the goodputs


@dataclass(frozen=True, slots=True)
class Decided:
    """The two neighbouring rates between which a goodput lies, and each seed's outcomes at both."""

    low: float
    high: float
    at_low: Mapping[int, Outcomes]
    at_high: Mapping[int, Outcomes]

    def goodput(self, low: Shares, high: Shares, target: float) -> Shares:
        """Where the attainment crosses the target, with these at the two rates: on a line through them, over
        the logarithm of the rate, and at most a rung outside."""
        falls = low > high
        part = np.clip((low - target) / np.where(falls, low - high, 1.0), -1.0, 2.0)
        part = np.where(falls, part, np.where(low >= target, 2.0, -1.0))
        made: Shares = self.low * (self.high / self.low) ** part
        return made


def ratio_of(ours: Decided, theirs: Decided, target: float, apart: float = 0.0) -> Ratio:
    """By drawing again and again (paired bootstrap): the same seeds, and of each the same blocks, for both
    and at all rates. Seeds are drawn too, as each had rounds of its own and the machine as it was then.

    Few blocks vary too little among themselves: where single requests give a wider interval, that counts.
    """
    four = (ours.at_low, ours.at_high, theirs.at_low, theirs.at_high)

    def ratio(sums: Shares) -> Shares:
        shares = sums[..., :4] / sums[..., 4:]
        mine = ours.goodput(shares[..., 0], shares[..., 1], target)
        made: Shares = mine / theirs.goodput(shares[..., 2], shares[..., 3], target)
        return made

    drawn = [ratio(_drawn(_sums(four, size))) for size in (BLOCK, 1)]
    low, high = np.quantile(drawn, (0.025, 0.975), axis=1)
    value = ratio(sum(each.sum(axis=0) for each in _sums(four, 1)))
    return Ratio(float(value), float(low.min()), float(high.max()), apart)


def _sums(four: Sequence[Mapping[int, Outcomes]], size: int) -> list[Shares]:
    """For each seed and block the good requests of all four, and how many it has: [block, 5]."""
    made = []
    for seed, each in four[0].items():
        starts = np.arange(0, len(each), size)
        counts = [*(np.array(one[seed], dtype=float) for one in four), np.ones(len(each))]
        made.append(np.stack([np.add.reduceat(count, starts) for count in counts], axis=1))
    return made


def _drawn(seeds: Sequence[Shares]) -> Shares:
    """The sums of as many seeds, and of as many blocks of each, as there are: [draw, 5]."""
    chance = np.random.default_rng(0)
    total = np.zeros((DRAWS, 5))
    for _ in seeds:
        chosen = chance.integers(len(seeds), size=DRAWS)
        for number, blocks in enumerate(seeds):
            here = chosen == number
            picks = chance.integers(len(blocks), size=(int(here.sum()), len(blocks)))
            total[here] += blocks[picks].sum(axis=1)
    return total


def _ratio(contest: Contest, first: str, second: str) -> Ratio | None:
    ours, theirs = _decided(contest, first), _decided(contest, second)
    if ours is None or theirs is None:
        return None
    speeds = [_speed(contest, name) for name in (first, second)]
    return ratio_of(ours, theirs, contest.trial.attainment, drift(s for s in speeds if s is not None))


def _decided(contest: Contest, name: str) -> Decided | None:
    """None where it has no two such rates that were seen whole with every seed."""
    rungs = contest.climb(name).deciding
    seeds = [contest.seeds(name, rung) for rung in rungs]
    count = len(contest.trial.seeds)
    if len(rungs) < 2 or not all(sum(run.whole for run in each.values()) == count for each in seeds):
        return None
    low, high = ({seed: _outcomes(contest, run) for seed, run in each.items()} for each in seeds)
    return Decided(contest.grid.rate(rungs[0]), contest.grid.rate(rungs[1]), low, high)


def _speed(contest: Contest, name: str) -> float | None:
    """The machine's, in the rounds that decided; None where nobody looked."""
    rungs = contest.climb(name).deciding
    last = {(r.rung, r.seed): r for r in contest.rounds if r.rung in rungs and r.whole(name)}
    speeds = [speed for done in last.values() for speed in done.speeds]
    return statistics.fmean(speeds) if speeds else None


def _outcomes(contest: Contest, run: Run | None) -> Outcomes:
    assert run is not None
    return outcomes(run, contest.trial.warm_up)
