"""A race in the manner of successive halving: every contender runs the same requests at one rate; whoever
misses the target is out, and the next heat is faster, longer, and with the requests of another seed.
"""

from __future__ import annotations

from collections.abc import Sequence

from taichi_serve.bench.goodput import Tally
from taichi_serve.search.crew import Workers
from taichi_serve.search.families import nearby
from taichi_serve.search.goodput import TARGET, Contender, Scene
from taichi_serve.slo import SLO

# Of the bound: the rates of the heats. Requests that bring less work than the mean are served beyond it.
LADDER = (0.5, 0.6, 0.7, 0.77, 0.83, 0.88, 0.92, 0.95, 0.98, 1.02, 1.08, 1.2)
BEGIN = 4  # the rung of the first heat, where the rates below are not known to be held
LONGER = 0.25  # how much more of a full run each later heat has
FULL_RUNS = 4  # a small field has longer heats: about so many full runs together
CUT = 3  # of a large field at most one in so many goes on from a heat
SMALL = 12  # a field of so many is not cut
RATIOS = 3  # of the best hybrid of each of so many ratios the neighbours are tried
Placed = list[tuple[Contender, float]]  # best first, each with the highest rate (requests/s) it held


def race(
    crew: Workers,
    field: list[Contender],
    top: float,
    requests: int,
    seeds: Sequence[int],
    keep: int,
    first: float,
    above: float = 0.0,
) -> Placed:
    """All that are still in the race at its end, the best first: at least `keep` of a field so large.

    Bisection over the rungs: where at least `keep` hold, the others are out and the race goes on above;
    where fewer do, it goes on below. One that held nowhere has the last rate that was run. The first heat
    has the share `first` of `requests`. Up to the rate `above` nothing is run.
    """
    rate = top * LADDER[0]
    held: dict[Contender, float] = {}
    low, high, heat = sum(top * rung <= above for rung in LADDER), len(LADDER), 0
    while len(field) > keep and low < high:
        rung = (low + high) // 2 if heat or low else BEGIN
        rate = top * LADDER[rung]
        share = min(1.0, max(first + heat * LONGER, FULL_RUNS / len(field)))
        length, seed = max(200, int(requests * share)), seeds[heat % len(seeds)]
        tallies = crew.attain([(c, rate, length, seed) for c in field])
        order = sorted(range(len(field)), key=lambda i: (*_standing(tallies[i], crew.scene), i))
        passed = [field[i] for i in order if tallies[i].attainment >= TARGET]
        held.update((c, max(rate, held.get(c, 0.0))) for c in passed)
        most = max(SMALL, len(field) // CUT)
        if len(passed) >= keep:
            field, low = passed[:most], rung + 1
        else:
            # Past the cliff attainment says little: only of a large field some are out.
            field, high = [field[i] for i in order][: max(most, len(field) // 2)], rung
        heat += 1
    return [(c, held.get(c, rate)) for c in field]


def second(first: Placed, knobs: bool) -> list[Contender]:
    """The field of the race after `first`: all that were in that one at its end, and the neighbours of the
    best of every ratio.

    All, because one heat parts neighbours by less than its requests can tell: of several that held, a
    neighbour of the third may be the best."""
    others = [other for one in _parents(first) for other in nearby(one, knobs)]
    return list(dict.fromkeys([*(c for c, _ in first), *others]))


def _parents(first: Placed) -> list[Contender]:
    """The best of every ratio: what a race takes for the best ratio may be the luck of its requests."""
    firsts: dict[int, Contender] = {}
    for contender, _ in first:
        firsts.setdefault(contender.sliders.p_heavy, contender)
    return list(firsts.values())[:RATIOS]


def _standing(tally: Tally, scene: Scene) -> tuple[float, float, float]:
    """The lowest stands best. A run ends when 90 % are good, so those that hold differ in how many were bad
    by then, and if nobody was in how near their 90th percentiles came to the SLO."""
    if tally.attainment < TARGET:
        return 1.0, -tally.attainment, 0.0
    if not scene.promised:
        return 0.0, tally.bad / tally.sent, _used(tally, scene.slo)
    classes = ((tally.classes.get(name), slo) for name, slo in scene.promised.items())
    used = [_used(one, slo) for one, slo in classes if one is not None]
    return 0.0, tally.bad / tally.sent, max(used, default=0.0)


def _used(tally: Tally, slo: SLO) -> float:
    return max(tally.ttft.quantile(TARGET) / slo.ttft, tally.tpot.quantile(TARGET) / slo.tpot)
