"""The best sliders and policy knobs for an SLO: aggregation, disaggregation and hybrid, each tuned for
itself.

A race in the manner of successive halving: every contender of a family (search/families.py) runs the same
requests at one rate; whoever misses the target is out, and the next heat is faster and longer. The last few
get a full bisection. Nothing in it is random but the workload's seed, so the same call gives the same table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

from taichi_serve.bench.goodput import Tally
from taichi_serve.search.bound import bound
from taichi_serve.search.families import FAMILIES, end_of, nearby
from taichi_serve.search.goodput import TARGET, Contender, Goodput, Scene, attain, goodput
from taichi_serve.slo import SLO

FINALISTS = {"aggregation": 2, "disaggregation": 2, "hybrid": 4}  # get a bisection
LADDER = (0.5, 0.6, 0.7, 0.77, 0.83, 0.88, 0.92, 0.95, 0.98)  # of the bound: the rates of the heats
FIRST_HEAT = 0.25  # share of a full run that the first heat has
NEAR_HEAT = 0.5  # the same among neighbours: they differ little
LONGER = 0.25  # how much more each later heat has
FULL_RUNS = 4  # a small field has longer heats: about so many full runs together
CUT = 3  # of a large field at most one in so many goes on from a heat
SMALL = 12  # a field of so many is not cut
RATIOS = 3  # of the best hybrid of each of so many ratios the neighbours are tried
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A contender with what it reached: requests/s, its share of the bound, and the run at that rate."""

    family: str
    contender: Contender
    rate: float
    share: float
    tally: Tally | None

    @property
    def end(self) -> str | None:
        """Which end of the sliders a hybrid is; None for one between, and for the other families."""
        return end_of(self.contender) if self.family == "hybrid" else None

    @property
    def label(self) -> str:
        """Family and contender; a hybrid that is an end of the sliders is called so."""
        name = self.contender.name.removeprefix("aggregation ")
        return f"{self.family} = {self.end}: {name}" if self.end else f"{self.family}: {name}"


@dataclass(frozen=True)
class Effort:
    """How long to look: requests of a full run (from seconds of traffic) and the rate's tolerance; with
    `knobs` also at those of the policy that seldom matter."""

    seconds: float = 120.0
    least: int = 800
    most: int = 4000
    tolerance: float = 0.01
    knobs: bool = False

    def requests(self, rate: float) -> int:
        """Requests of a full run around this rate."""
        return int(min(self.most, max(self.least, rate * self.seconds)))


# --------------------------------------------------------------------------------------------- on all cores

_scene: Scene | None = None


def _start(scene: Scene) -> None:
    global _scene  # noqa: PLW0603  # a worker process has one scene, sent once and not with every task
    _scene = scene


def _attain(task: tuple[Contender, float, int, int]) -> Tally:
    assert _scene is not None
    return attain(_scene, *task, target=TARGET)


def _whole(task: tuple[Contender, float, int, int]) -> Tally:
    assert _scene is not None
    return attain(_scene, *task)


def _goodput(task: tuple[Contender, int, int, float, float, float | None]) -> Goodput:
    assert _scene is not None
    return goodput(_scene, *task)


class Workers:
    """Runs on several processes, or in this one; results come in the order of the tasks."""

    def __init__(self, scene: Scene, pool: ProcessPoolExecutor | None) -> None:
        self.scene = scene
        self.pool = pool

    def attain(self, tasks: Iterable[tuple[Contender, float, int, int]]) -> list[Tally]:
        """One run for each task."""
        return list(self.pool.map(_attain, tasks, chunksize=2) if self.pool else map(_attain, tasks))

    def attain_all(self, tasks: Iterable[tuple[Contender, float, int, int]]) -> list[Tally]:
        """One run to its end for each task."""
        return list(self.pool.map(_whole, tasks) if self.pool else map(_whole, tasks))

    def goodput(
        self, tasks: Iterable[tuple[Contender, int, int, float, float, float | None]]
    ) -> list[Goodput]:
        """One bisection for each task."""
        return list(self.pool.map(_goodput, tasks) if self.pool else map(_goodput, tasks))


@contextmanager
def workers(scene: Scene, processes: int | None = None) -> Iterator[Workers]:
    """As many processes as there are cores, or as asked for; with one, everything runs here."""
    processes = processes or os.cpu_count() or 1
    if processes == 1:
        _start(scene)
        yield Workers(scene, None)
        return
    context = get_context("forkserver")
    with ProcessPoolExecutor(processes, context, initializer=partial(_start, scene)) as pool:
        yield Workers(scene, pool)


# ------------------------------------------------------------------------------------------------- the race


def race(
    crew: Workers,
    field: list[Contender],
    top: float,
    requests: int,
    seed: int,
    keep: int,
    first: float,
    above: float = 0.0,
) -> list[tuple[Contender, float]]:
    """The `keep` that hold the target at the highest rates, best first, each with the highest rate it held.

    Bisection over the rungs: where more than `keep` hold, the others are out and the race goes on above;
    where fewer do, it goes on below. One that held nowhere has the last rate that was run. Up to the rate
    `above` nothing is run.
    """
    rate = top * LADDER[0]
    held: dict[Contender, float] = {}
    low, high, heat = sum(top * rung <= above for rung in LADDER), len(LADDER), 0
    while len(field) > keep and low < high:
        rung = (low + high) // 2
        rate = top * LADDER[rung]
        share = min(1.0, max(first + heat * LONGER, FULL_RUNS / len(field)))
        length = max(200, int(requests * share))
        tallies = crew.attain([(c, rate, length, seed) for c in field])
        order = sorted(range(len(field)), key=lambda i: (*_standing(tallies[i], crew.scene.slo), i))
        passed = [field[i] for i in order if tallies[i].attainment >= TARGET]
        held.update((c, max(rate, held.get(c, 0.0))) for c in passed)
        most = max(SMALL, len(field) // CUT)
        if len(passed) >= keep:
            field, low = passed[:most], rung + 1
        else:
            # Past the cliff attainment says little: only of a large field some are out.
            field, high = [field[i] for i in order][: max(most, len(field) // 2)], rung
        heat += 1
    return [(c, held.get(c, rate)) for c in field[:keep]]


def _parents(last: list[tuple[Contender, float]]) -> list[Contender]:
    """The best of every ratio: what one heat takes for the best ratio may be the luck of its requests."""
    firsts: dict[int, Contender] = {}
    for contender, _ in last:
        firsts.setdefault(contender.sliders.p_heavy, contender)
    return list(firsts.values())[:RATIOS]


def _standing(tally: Tally, slo: SLO) -> tuple[float, float, float]:
    """The lowest stands best. A run ends when 90 % are good, so those that hold differ in how many were bad
    by then, and if nobody was in how near their 90th percentiles came to the SLO."""
    if tally.attainment < TARGET:
        return 1.0, -tally.attainment, 0.0
    used = max(tally.ttft.quantile(TARGET) / slo.ttft, tally.tpot.quantile(TARGET) / slo.tpot)
    return 0.0, tally.bad / tally.sent, used


def search(
    scene: Scene,
    instances: int,
    seed: int = 0,
    families: Iterable[str] = tuple(FAMILIES),
    effort: Effort | None = None,
    processes: int | None = None,
    tell: Tell = lambda _: None,
) -> list[Found]:
    """The best of every family, best first; `tell` hears what is going on."""
    effort = effort or Effort()
    top = bound(scene.machine, scene.workload, scene.slo.tpot, instances, scene.max_running)
    longest = min(8192, scene.machine.max_model_len)
    requests = effort.requests(top)
    found: list[Found] = []
    with workers(scene, processes) as crew:
        for family in families:
            field = FAMILIES[family](instances, longest)
            tell(f"{family}: {len(field)} contenders")
            keep = FINALISTS[family]
            most = 2 * keep if family == "hybrid" else keep
            last = race(crew, field, top, requests, seed, most, FIRST_HEAT)
            if family == "hybrid":
                more = list(
                    dict.fromkeys(other for one in _parents(last) for other in nearby(one, effort.knobs))
                )
                tell(f"{family}: {len(more)} neighbours of the best")
                last = race(crew, more, top, requests, seed, keep, NEAR_HEAT, last[0][1] * 0.9)
            tell(f"{family}: {len(last)} finalists around {last[0][1]:.3g} requests/s")
            tasks = [(c, requests, seed, top, effort.tolerance, guess) for c, guess in last]
            for (contender, _), result in zip(last, crew.goodput(tasks), strict=True):
                found.append(Found(family, contender, result.rate, result.rate / top, result.tally))
    return _ranked(with_ends(found))


def with_ends(found: list[Found]) -> list[Found]:
    """A baseline that beats every hybrid between is the best hybrid: the ends of the sliders are members."""
    first = best(_ranked(found))
    if "hybrid" not in first:
        return found
    ends = [replace(f, family="hybrid") for name, f in first.items() if name != "hybrid"]
    return found + [f for f in ends if f.rate > first["hybrid"].rate]


def _ranked(found: list[Found]) -> list[Found]:
    return sorted(found, key=lambda f: (-f.rate, f.family, f.contender.name))


def best(found: list[Found]) -> dict[str, Found]:
    """The first of every family in a table that is sorted."""
    firsts: dict[str, Found] = {}
    for entry in found:
        firsts.setdefault(entry.family, entry)
    return firsts
