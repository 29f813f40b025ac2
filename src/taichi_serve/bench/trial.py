"""What is measured (Trial), and the search for the highest rate that keeps it (climb)."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.bracket import Bracket
from taichi_serve.bench.endpoint import gone
from taichi_serve.bench.mix import Mix
from taichi_serve.bench.openloop import OpenLoop, Plan, Tell
from taichi_serve.bench.score import Others, Run, Score
from taichi_serve.bench.workload import Workload, workload
from taichi_serve.slo import SLO


@dataclass(frozen=True, slots=True)
class Trial:
    """One goodput measurement, but for the server. Two with equal trials can be compared."""

    workload: str  # a name, or the path of a trace
    slo: SLO
    scale: float = 1.0  # of all lengths
    attainment: float = 0.9
    requests: int = 200  # counted ones, for every seed
    warm_up: int = 20  # sent before them at every rate and for every seed, not counted
    seeds: tuple[int, ...] = (0,)
    start: float = 1.0  # the first rate, requests/s
    tolerance: float = 0.1
    full: bool = False  # no run ends early
    over_limit: str = "refuse"  # rows of a trace over the model's limit: refuse, skip or cut
    arrivals: Arrivals = Arrivals()
    mix: Mix = Mix()  # of classes; `slo` is that of a server whose requests are of none
    step: float = 2.0  # from `start` to the next rate, and squared with every further one, up to 2

    def __post_init__(self) -> None:
        if not 0 < self.attainment <= 1:
            raise ValueError(f"attainment must be above 0 and at most 1, not {self.attainment!r}")
        if self.requests < 1:
            raise ValueError(f"requests must be at least 1, not {self.requests}")
        if self.warm_up < 0:
            raise ValueError(f"warm-up must be at least 0, not {self.warm_up}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, not {self.seeds!r}")
        _ = self.bracket

    @property
    def bracket(self) -> Bracket:
        """Before the first rate."""
        return Bracket(self.start, self.tolerance, step=self.step)

    @property
    def total(self) -> int:
        """Counted requests at one rate."""
        return self.requests * len(self.seeds)

    def lengths(self, limit: int) -> Workload:
        """Its requests for a model that takes so many tokens."""
        return workload(self.workload, limit, self.scale, self.over_limit, self.arrivals, self.mix)


async def measure(
    loop: OpenLoop,
    trial: Trial,
    requests: Workload,
    rate: float,
    early: bool,
    tell: Tell,
    others: Others = Others(),
) -> Run:
    """One rate, one seed after the other, until the outcome is certain. Of `others` see Score: with some, the
    trial has the seeds of one round."""
    score = Score(trial.slo, trial.total, trial.attainment, others)
    began = time.perf_counter()
    plans = [Plan.of(requests, rate, trial.warm_up, trial.requests, seed) for seed in trial.seeds]
    before = await loop.instances()
    for plan in plans:
        await loop.run(plan, score, early, tell)
        if early and score.kept is not None:
            break
    made = score.run(rate, time.perf_counter() - began)
    span = min(plan.span for plan in plans)
    return replace(made, span=span, lost=gone(before, await loop.instances()))


@dataclass(frozen=True, slots=True)
class Goodput:
    """The rate found (requests/s, 0 for none), every run on the way there, and a whole one at that rate.

    With `at_least` no higher rate was missed: the goodput is that or more, and nobody knows how much more.
    """

    rate: float
    runs: tuple[Run, ...]
    there: Run | None
    at_least: bool = False

    @classmethod
    def of(cls, rate: float, runs: tuple[Run, ...], there: Run | None) -> Goodput:
        """With what the last verdict on every rate says of those above."""
        verdicts = {run.rate: run.kept for run in runs}
        return cls(rate, runs, there, rate > 0 and all(kept for r, kept in verdicts.items() if r > rate))

    @property
    def words(self) -> str:
        """The rate, as far as it is known."""
        if self.at_least:
            return f"at least {self.rate:.3g}"
        if self.rate:
            return f"{self.rate:.3g}"
        return f"below {min(run.rate for run in self.runs):.3g}" if self.runs else "0"

    @property
    def lost(self) -> tuple[str, ...]:
        """Instances that were not there in one of the runs."""
        return tuple(sorted({name for run in self.runs for name in run.lost}))


async def climb(start: Bracket, run: Callable[[float, bool], Awaitable[Run]]) -> Goodput:
    """Bisect, and see the rate found to its end: `run` takes a rate and whether it may end early.

    A rate that misses the target then, though it kept it before, counts as missed, and the search goes on.
    Where even the highest rate within reach keeps it, what is found is a lower bound.
    """
    runs: list[Run] = []
    while True:
        verdicts = {made.rate: made.kept for made in runs}  # the last one of each rate
        bracket = start
        for rate, kept in verdicts.items():
            bracket = bracket.after(rate, kept)
        following = bracket.next()
        if following is not None:
            runs.append(await run(following, True))
        elif not bracket.low:
            return Goodput.of(0.0, tuple(runs), None)
        else:
            there = next((r for r in runs if r.rate == bracket.low and r.whole), None)
            if there is not None:
                return Goodput.of(bracket.low, tuple(runs), there)
            runs.append(await run(bracket.low, False))
