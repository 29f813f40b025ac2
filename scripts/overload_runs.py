"""One simulated run past goodput, and what became of its requests. For scripts/overload.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from overload_fates import Fate, Watch
from overload_settings import Setting, scene

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.cluster.base import run
from taichi_serve.search.goodput import Contender, Scene, attain
from taichi_serve.search.sliders import under
from taichi_serve.slo import SLO


@dataclass(frozen=True)
class Figures:
    """One run: shares of all requests sent, good requests/s, and the p99 TTFT of the served over the SLO."""

    attainment: float
    good: float
    wait: float
    refused: float
    best_effort: float
    quartiles: tuple[float, ...]


def figures(fates: Sequence[Fate], best_effort: int, slo: SLO) -> Figures:
    """From what became of every request."""
    sent = len(fates)
    waits = sorted(fate.ttft for fate in fates if fate.ttft is not None)
    lengths = sorted(fates, key=lambda fate: fate.prompt)
    parts = [lengths[n * sent // 4 : (n + 1) * sent // 4] for n in range(4)]
    return Figures(
        fmean(fate.good(slo) for fate in fates),
        sum(fate.good(slo) for fate in fates) / (fates[-1].at - fates[0].at),
        waits[math.ceil(0.99 * len(waits)) - 1] / slo.ttft,
        fmean(fate.refused for fate in fates),
        best_effort / sent,
        tuple(fmean(fate.good(slo) for fate in part) for part in parts),
    )


@dataclass(frozen=True)
class Task:
    """A run: `rate` is in requests/s."""

    setting: Setting
    arrivals: Arrivals
    contender: Contender
    mode: str
    rate: float
    seed: int

    @property
    def requests(self) -> int:
        """How many are sent."""
        return round(self.rate * self.setting.seconds)


@cache
def _scene(setting: Setting, arrivals: Arrivals) -> Scene:
    return scene(setting, arrivals)


def simulated(task: Task) -> Figures:
    """One run to its end."""
    made, sliders = _scene(task.setting, task.arrivals), task.contender.sliders
    cluster = made.cluster(sliders, task.rate, task.requests, task.seed)
    scheduler = made.scheduler(sliders, under(task.mode, task.contender).policy, cluster.capacities)
    watch = Watch(scheduler)
    run(watch, cluster)
    return figures([*watch.fates.values()], scheduler.counters.best_effort, made.slo)


def share(task: Task) -> float:
    """The share of good requests of one run."""
    made = _scene(task.setting, task.arrivals)
    return attain(made, under(task.mode, task.contender), task.rate, task.requests, task.seed).attainment
