"""The race: pretended contenders whose limits are known, and who of the first race is in the second."""

from dataclasses import dataclass, field

from taichi_serve.bench.goodput import Tally
from taichi_serve.scheduling.policy import Policy
from taichi_serve.search.families import hybrid, mixed, nearby
from taichi_serve.search.goodput import Contender
from taichi_serve.search.race import LADDER, race, second
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO


@dataclass(frozen=True)
class Pretence:
    slo: SLO
    promised: dict[str, SLO] = field(default_factory=dict)


@dataclass
class Pretended:
    """Workers for whom a contender holds every rate up to its limit."""

    limits: dict[Contender, float]
    luck: dict[int, float] = field(default_factory=dict)  # of a seed: what limits are multiplied by
    runs: list[tuple[float, int, int, int]] = field(default_factory=list)

    scene: Pretence = field(default_factory=lambda: Pretence(SLO(1.0, 0.1)))

    def attain(self, tasks):
        tasks = list(tasks)
        _, rate, requests, seed = tasks[0]
        self.runs.append((rate, requests, seed, len(tasks)))
        return [tally(self.limits[c] * self.luck.get(seed, 1.0), rate, requests) for c, *_ in tasks]


def tally(limit, rate, requests):
    """Of a run that ended as soon as 90 % were good, with the fewer bad ones the further from the limit; or
    of one that missed."""
    good = 0.9 if rate <= limit else 0.8 * limit / rate
    found = Tally(sent=requests, good=round(good * requests), bad=round(0.1 * requests * rate / limit))
    for times in (found.ttft, found.tpot):
        times.add(0.01)
    return found


def field_of(limits):
    contenders = [mixed(Sliders(3, 1, 8192, 32 * n), Policy()) for n in range(len(limits))]
    return dict(zip(contenders, limits, strict=True))


def test_the_race_finds_those_that_hold_the_highest_rates():
    limits = field_of([5.0, 9.1, 7.0, 9.6, 8.0, 9.7, 6.0, 3.0])
    last = race(Pretended(limits), list(limits), 10.0, 1000, [0], 3, 0.25)
    assert {limits[c] for c, _ in last[:3]} == {9.1, 9.6, 9.7}


def test_requests_that_bring_less_work_than_the_mean_are_raced_beyond_the_bound():
    limits = field_of([10.0, 10.3, 10.9, 11.5])
    crew = Pretended(limits)
    last = race(crew, list(limits), 10.0, 1000, [0], 1, 0.25)
    assert max(rate for rate, *_ in crew.runs) > 10.0
    assert (limits[last[0][0]], last[0][1]) == (11.5, 10.8)


def test_every_heat_has_the_requests_of_another_seed():
    limits = field_of([9.0 + n / 100 for n in range(40)])
    crew = Pretended(limits)
    race(crew, list(limits), 10.0, 1000, [4, 5, 6], 2, 0.25)
    seeds = [seed for _, _, seed, _ in crew.runs]
    assert len(seeds) >= 3
    assert seeds == [(4, 5, 6)[heat % 3] for heat in range(len(seeds))]


def test_a_seed_with_little_work_alone_decides_nothing():
    # Of seed 0 everybody holds everything; of seed 1 the limits show.
    limits = field_of([7.0, 8.0, 9.0, 9.5])
    last = race(Pretended(limits, {0: 9.0}), list(limits), 10.0, 1000, [0, 1], 1, 0.25)
    assert limits[last[0][0]] == 9.5


def test_whoever_held_in_the_first_race_is_in_the_second():
    # Eight of one ratio hold the same: only one of them can be that ratio's parent.
    limits = field_of([9.5] * 8 + [1.0] * 22)
    first = race(Pretended(limits), list(limits), 10.0, 1000, [0], 8, 0.25)
    more = second(first, knobs=False)
    assert {c for c, limit in limits.items() if limit == 9.5} <= set(more)
    assert set(nearby(first[0][0])) <= set(more)
    assert len(set(more)) == len(more)


def test_an_end_of_the_sliders_that_held_is_in_the_second_race_too():
    limits = {c: 9.0 if c.sliders.d_chunk == 0 and not c.policy.degrades else 2.0 for c in hybrid(4, 8192)}
    first = race(Pretended(limits), list(limits), 10.0, 1000, [0], 3, 0.25)
    assert {c for c, limit in limits.items() if limit == 9.0} <= set(second(first, knobs=False))


def test_what_is_known_to_be_held_is_not_run_again():
    limits = field_of([9.0, 9.3, 9.6])
    crew = Pretended(limits)
    race(crew, list(limits), 10.0, 1000, [0], 1, 0.5, above=8.0)
    assert min(rate for rate, *_ in crew.runs) > 8.0
    assert all(any(abs(rate - 10.0 * rung) < 1e-9 for rung in LADDER) for rate, *_ in crew.runs)
