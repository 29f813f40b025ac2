"""The best sliders and policy knobs for an SLO: aggregation, disaggregation and hybrid, each tuned for
itself.

A race in the manner of successive halving: every contender of a family runs the same requests at one rate;
whoever misses the target is out, and the next heat is faster and longer. The last few get a full bisection.
Nothing in it is random but the workload's seed, so the same call gives the same table.
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
from taichi_serve.scheduling.policy import Policy
from taichi_serve.search.bound import bound
from taichi_serve.search.goodput import TARGET, Contender, Goodput, Scene, attain, goodput
from taichi_serve.sliders import Sliders

CHUNKS = (128, 192, 256, 384, 512, 768, 1024, 2048)
# Low ones too: where KV is ample, degrading is all that lets P-heavy instances share in decoding.
WATERMARKS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.98)
FINALISTS = 3
LADDER = (0.5, 0.6, 0.7, 0.77, 0.83, 0.88, 0.92, 0.95, 0.98)  # of the bound: the rates of the heats
FIRST_HEAT, LONGER = (
    0.25,
    0.2,
)  # share of a full run that the first heat has, and how much more each later one
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A contender with what it reached: requests/s, its share of the bound, and the run at that rate."""

    family: str
    contender: Contender
    rate: float
    share: float
    tally: Tally | None


@dataclass(frozen=True)
class Effort:
    """How long to look: requests of a full run (from seconds of traffic) and the rate's tolerance."""

    seconds: float = 120.0
    least: int = 800
    most: int = 4000
    tolerance: float = 0.01

    def requests(self, rate: float) -> int:
        """Requests of a full run around this rate."""
        return int(min(self.most, max(self.least, rate * self.seconds)))


def aggregation(instances: int, longest: int) -> list[Contender]:
    """Every instance alike: Sarathi-Serve's chunks, and Orca's whole prompts."""
    policy = Policy(ttft_margin=1.0)
    chunks = [c for c in CHUNKS if c < longest] + [longest]
    return [Contender(f"aggregation {c}", Sliders(0, instances, 0, c), policy) for c in chunks]


def disaggregation(instances: int, longest: int) -> list[Contender]:
    """P instances that only prefill whole prompts, D instances that only decode; nobody is degraded."""
    policy = Policy(ttft_margin=1.0, watermark=1.0)
    return [
        Contender(f"{p}P{instances - p}D", Sliders(p, instances - p, longest, 0), policy)
        for p in range(1, instances)
    ]


def mixed(p: int, d: int, p_chunk: int, d_chunk: int, policy: Policy) -> Contender:
    """A hybrid under a name that says all that was tuned."""
    name = f"{p}P{d}D S_P {p_chunk} S_D {d_chunk} margin {policy.ttft_margin:g}"
    if (policy.watermark, policy.alpha) != (Policy().watermark, Policy().alpha):
        name += f" watermark {policy.watermark:g} alpha {policy.alpha:g}"
    if policy.tpot_margin != Policy().tpot_margin:
        name += f" TPOT margin {policy.tpot_margin:g}"
    return Contender(name, Sliders(p, d, p_chunk, d_chunk), policy)


def hybrid(instances: int, longest: int) -> list[Contender]:
    """R_PD x S_P x S_D; `nearby` then tries the neighbours of the best, and the policy's own knobs."""
    ratios = range(1, instances, max(1, instances // 8))
    return [
        mixed(p, instances - p, min(longest, sp), sd, Policy())
        for p in ratios
        for sp in (2048, longest)
        for sd in (128, 256, 512)
    ]


def nearby(contender: Contender) -> list[Contender]:
    """The contender, and those that differ from it in one thing."""
    s, policy = contender.sliders, contender.policy
    tried = [(s.p_chunk, s.d_chunk, replace(policy, ttft_margin=m)) for m in (0.3, 0.4, 0.65, 0.8, 1.0)]
    tried += [(s.p_chunk, c, policy) for c in (s.d_chunk * 3 // 4, s.d_chunk * 3 // 2) if c <= s.p_chunk]
    tried += [(s.p_chunk // 2, s.d_chunk, policy)] if s.p_chunk // 2 >= s.d_chunk else []
    tried += [(s.p_chunk, s.d_chunk, replace(policy, watermark=w)) for w in WATERMARKS]
    tried += [(s.p_chunk, s.d_chunk, replace(policy, alpha=a)) for a in (0.85,)]
    tried += [(s.p_chunk, s.d_chunk, replace(policy, tpot_margin=m)) for m in (0.65, 1.0)]
    return [contender] + [mixed(s.p_heavy, s.d_heavy, sp, sd, p) for sp, sd, p in tried]


FAMILIES: dict[str, Callable[[int, int], list[Contender]]] = {
    "aggregation": aggregation,
    "disaggregation": disaggregation,
    "hybrid": hybrid,
}


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
    crew: Workers, field: list[Contender], top: float, requests: int, seed: int, keep: int
) -> tuple[list[Contender], float]:
    """The `keep` that hold the target at the highest rates, best first, and the last rate that was run.

    Bisection over the rungs: where more than `keep` hold, the others are out and the race goes on above;
    where fewer do, it goes on below with everybody, since past the cliff attainment says little.
    """
    rate = top * LADDER[0]
    low, high, heat = 0, len(LADDER), 0
    while len(field) > keep and low < high:
        rung = (low + high) // 2
        rate = top * LADDER[rung]
        length = max(200, int(requests * min(1.0, FIRST_HEAT + heat * LONGER)))
        tallies = crew.attain([(c, rate, length, seed) for c in field])
        order = sorted(range(len(field)), key=lambda i: (-tallies[i].attainment, i))
        held = sum(t.attainment >= TARGET for t in tallies)
        field = [field[i] for i in order]
        if held >= keep:
            field, low = field[:held], rung + 1
        else:
            high = rung
        heat += 1
    return field[:keep], rate


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
            last, rate = race(crew, field, top, requests, seed, FINALISTS)
            if family == "hybrid":
                more = list(dict.fromkeys(other for one in last[:2] for other in nearby(one)))
                tell(f"{family}: {len(more)} neighbours of the best")
                last, rate = race(crew, more, top, requests, seed, FINALISTS)
            tell(f"{family}: {len(last)} finalists around {rate:.3g} requests/s")
            tasks = [(c, requests, seed, top, effort.tolerance, rate) for c in last]
            for contender, result in zip(last, crew.goodput(tasks), strict=True):
                found.append(Found(family, contender, result.rate, result.rate / top, result.tally))
    return sorted(found, key=lambda f: (-f.rate, f.family, f.contender.name))


def best(found: list[Found]) -> dict[str, Found]:
    """The first of every family in a table that is sorted."""
    firsts: dict[str, Found] = {}
    for entry in found:
        firsts.setdefault(entry.family, entry)
    return firsts
