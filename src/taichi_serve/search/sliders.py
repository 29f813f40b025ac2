"""The best sliders and policy knobs for an SLO: aggregation, disaggregation and hybrid, each tuned for
itself, and then judged on requests that the tuning has not seen.

Every family (search/families.py) is raced (search/race.py). The last few get a bisection over several seeds
(search/climb.py), and the best of each family the same again over others: that is the goodput that is told,
for the highest of many tuned figures is high by luck as well. How long a run is and how many seeds there are
follows from the workload (search/effort.py). Nothing is random but the workload's seeds, so the same call
gives the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from taichi_serve.bench.goodput import Tally
from taichi_serve.scheduling.policy import SERVE
from taichi_serve.search.bound import bound
from taichi_serve.search.climb import climb
from taichi_serve.search.crew import Workers, workers
from taichi_serve.search.curve import Curve, spread
from taichi_serve.search.effort import Effort, Plan, plan
from taichi_serve.search.families import FAMILIES, end_of
from taichi_serve.search.goodput import Contender, Scene
from taichi_serve.search.interval import Interval
from taichi_serve.search.race import race, second

FINALISTS = {"aggregation": 2, "disaggregation": 2, "hybrid": 4}  # get bisections
FIRST_HEAT = 0.25  # share of a full run that the first heat has
NEAR_HEAT = 0.5  # the same among neighbours: they differ little
FAR = 4.0  # times the bound: nothing is tried beyond, and whoever keeps even that has so much "at least"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A contender with what it reached: requests/s, its share of the bound, and the runs it held there.

    The rate is of the seeds that judged it, with the shares of good requests in `judged`; of one that was
    only tuned it is of the seeds that tuned, as `tuned` always is."""

    family: str
    contender: Contender
    rate: float
    share: float
    tally: Tally | None
    judged: Curve | None = None
    tuned: float | None = None

    @property
    def end(self) -> str | None:
        """Which end of the sliders a hybrid is; None for one between, and for the other families."""
        return end_of(self.contender) if self.family == "hybrid" else None

    @property
    def label(self) -> str:
        """Family and contender; a hybrid that is an end of the sliders is called so."""
        name = self.contender.name.removeprefix("aggregation ")
        return f"{self.family} = {self.end}: {name}" if self.end else f"{self.family}: {name}"

    @property
    def interval(self) -> Interval | None:
        """Of the rate, over the seeds that judged it; None where none did."""
        return spread(self.judged) if self.judged else None


@dataclass(frozen=True)
class Hunt:
    """A search under way: who runs, what is planned, the bound (requests/s), and who hears of it."""

    crew: Workers
    plan: Plan
    top: float
    effort: Effort
    tell: Tell

    @property
    def most(self) -> float:
        """Requests/s beyond which nothing is tried."""
        return FAR * self.top

    def tuned(self, family: str, field: list[Contender]) -> list[Found]:
        """The finalists of a family, each with its goodput over the seeds that tune."""
        self.tell(f"{family}: {len(field)} contenders")
        keep, made = FINALISTS[family], self.plan
        most = 2 * keep if family == "hybrid" else keep
        last = race(self.crew, field, self.top, made.requests, made.tuning, most, FIRST_HEAT)
        if family == "hybrid":
            more = second(last, self.effort.knobs)
            self.tell(f"{family}: {len(more)} that held, and neighbours of the best")
            above = last[0][1] * 0.9
            last = race(self.crew, more, self.top, made.requests, made.tuning, keep, NEAR_HEAT, above)
        last = last[:keep]
        self.tell(f"{family}: {len(last)} finalists around {last[0][1]:.3g} requests/s")
        reached = climb(self.crew, last, made.requests, made.tuning, self.effort.tolerance, self.most)
        return [
            Found(family, c, one.rate, one.rate / self.top, one.tally, tuned=one.rate)
            for (c, _), one in zip(last, reached, strict=True)
        ]

    def judged(self, found: list[Found]) -> list[Found]:
        """The same with the best of every family judged, on the same seeds: no other has seen them."""
        chosen = list(best(found).values())
        guesses = {entry.contender: entry.rate or self.top / 2 for entry in chosen}
        seeds = self.plan.judging
        self.tell(f"the best of each family is judged: {len(guesses)} on {len(seeds)} seeds")
        field, requests = list(guesses.items()), self.plan.requests
        results = climb(self.crew, field, requests, seeds, self.effort.tolerance, self.most)
        reached = dict(zip(guesses, results, strict=True))

        def told(entry: Found) -> Found:
            mine = reached[entry.contender]
            share = mine.rate / self.top
            return replace(entry, rate=mine.rate, share=share, tally=mine.tally, judged=mine.curve)

        return [told(entry) if entry in chosen else entry for entry in found]


def search(
    scene: Scene,
    instances: int,
    seed: int = 0,
    families: Iterable[str] = tuple(FAMILIES),
    effort: Effort | None = None,
    processes: int | None = None,
    tell: Tell = lambda _: None,
    overload: str = SERVE,
) -> list[Found]:
    """The best of every family, judged, best first; then what else came to a bisection. All of them do with
    requests that would be late what `overload` says. `tell` hears what is going on."""
    effort = effort or Effort()
    top = bound(scene.machine, scene.workload, scene.loosest.tpot, instances, scene.max_running)
    longest = min(8192, scene.machine.max_model_len)
    with workers(scene, processes) as crew:
        hunt = Hunt(crew, plan(scene, top, effort, seed), top, effort, tell)
        found: list[Found] = []
        for family in families:
            field = [under(overload, one) for one in FAMILIES[family](instances, longest)]
            found += hunt.tuned(family, field)
        found = ranked(with_ends(found))
        return ranked(hunt.judged(found)) if hunt.plan.judging else found


def under(overload: str, contender: Contender) -> Contender:
    """The same, doing this with requests that would be late."""
    return replace(contender, policy=replace(contender.policy, overload=overload))


def with_ends(found: list[Found]) -> list[Found]:
    """A baseline that beats every hybrid between is the best hybrid: the ends of the sliders are members."""
    first = best(ranked(found))
    if "hybrid" not in first:
        return found
    ends = [replace(f, family="hybrid") for name, f in first.items() if name != "hybrid"]
    return found + [f for f in ends if f.rate > first["hybrid"].rate]


def ranked(found: list[Found]) -> list[Found]:
    """Those that were judged first, each part by its rate."""
    return sorted(found, key=lambda f: (not f.judged, -f.rate, f.family, f.contender.name))


def best(found: list[Found]) -> dict[str, Found]:
    """The first of every family in a table that is sorted."""
    firsts: dict[str, Found] = {}
    for entry in found:
        firsts.setdefault(entry.family, entry)
    return firsts
