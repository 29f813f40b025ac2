"""How much a search runs: the length of a run and the number of seeds follow from the workload's variance.

Goodput moves with the work that the drawn requests bring, which over n of them has a standard error of
sqrt(dispersion / n). With long tails the dispersion is large, and a rate that a few hundred requests of one
seed hold says little. So a pilot estimates the dispersion from the workload itself, a run is as long as a
stated error of its work needs, and as many seeds judge as a stated error of their mean needs; both within
limits that are said. The seeds that judge are never among those that tune.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from taichi_serve.bench.lengths import InOrder
from taichi_serve.bench.sharing import Seen, requests, seen
from taichi_serve.latency.model import prompt_attention
from taichi_serve.search.goodput import Scene

PILOT, BATCH = 20_000, 250  # requests drawn, in batches of so many: arrivals may depend on each other
RUN_ERROR = 0.05  # standard error of the work of one run
TUNING_ERROR = 0.03  # of all runs of one contender that tune: what they compare has the same requests
JUDGES = 5  # at least so many seeds judge, where the limit allows: an interval over fewer is wide
SEEDS = (
    1000  # of `--seed n` are n * 1000 and on: the first half tunes, the rest judges, the last is the pilot's
)
FULL_STEP = 4096.0  # tokens of a step in which a token of a prompt costs what it must


@dataclass(frozen=True)
class Effort:
    """How long to look. With `knobs` also at those of the policy that seldom matter."""

    seconds: float = 120.0  # of traffic that a run has at least
    least: int = 800  # requests of a run
    most: int = 16_000  # the same, whatever else asks for more
    tolerance: float = 0.02  # between the rates about a goodput; within, it lies on a straight line
    knobs: bool = False
    tuners: tuple[int, int] = (3, 8)  # at least and at most so many seeds tune
    error: float = 0.01  # standard error of the work of all runs that judge a contender, as a share
    judging: int = 60_000  # requests of these runs at most; 0: nobody is judged


@dataclass(frozen=True)
class Plan:
    """Requests of a run, the seeds that tune and those that judge, and how well the work is known then."""

    requests: int
    tuning: tuple[int, ...]
    judging: tuple[int, ...]
    dispersion: float
    asked: float  # standard error of the work of all runs that judge, as a share
    rows: int | None = None  # of a trace that is played in its order: all requests there are

    @property
    def run_error(self) -> float:
        """Standard error of the work of one run, as a share."""
        return math.sqrt(self.dispersion / min(self.requests, self.rows or self.requests))

    @property
    def error(self) -> float:
        """Standard error of the work of all runs that judge, as a share; NaN where none do. What a trace
        repeats is nothing new."""
        requests = min(self.requests * len(self.judging), self.rows or self.requests * len(self.judging))
        return math.sqrt(self.dispersion / requests) if requests else math.nan

    @property
    def cut(self) -> bool:
        """Whether a limit of the effort kept runs or seeds below what the workload asks for."""
        near = 1 + 1e-6
        return bool(self.judging) and (self.error > self.asked * near or self.run_error > RUN_ERROR * near)


def plan(scene: Scene, top: float, effort: Effort, seed: int) -> Plan:
    """For rates around `top` (requests/s)."""
    source = scene.workload.source
    rows = len(source.trace) if isinstance(source, InOrder) else None
    return planned(dispersion(pilot(scene, seed)), top, effort, seed, rows)


def pilot(scene: Scene, seed: int) -> Iterator[tuple[float, float]]:
    """When work arrives and how many instance seconds it is, at one request/s."""
    workload, seconds = scene.workload, work(scene)
    calls = list(workload.calls(1.0, PILOT, seed * SEEDS + SEEDS - 1))
    for (at, _), one in zip(requests(calls), seen(calls, workload.block_size), strict=True):
        if at > calls[-1].at:
            return  # later turns of what has begun, and nobody begins any more
        yield at, seconds(one)


def planned(spread: float, top: float, effort: Effort, seed: int, rows: int | None = None) -> Plan:
    """The same from a dispersion that is known; `rows` as in Plan."""
    wanted = max(effort.least, math.ceil(top * effort.seconds), _enough(spread, RUN_ERROR, 1))
    length = min(effort.most, wanted)
    fewest, most = effort.tuners
    tuners = min(most, max(fewest, _enough(spread, TUNING_ERROR, length)))
    judges = max(JUDGES, _enough(spread, effort.error, length))
    judges = max(2, min(judges, effort.judging // length, SEEDS // 2 - 1)) if effort.judging else 0
    first, middle = seed * SEEDS, seed * SEEDS + SEEDS // 2
    tuning, judging = range(first, first + tuners), range(middle, middle + judges)
    return Plan(length, tuple(tuning), tuple(judging), spread, effort.error, rows)


def _enough(spread: float, error: float, requests: int) -> int:
    """Runs of so many requests that together have at most this standard error."""
    return math.ceil(spread / error**2 / requests - 1e-9)


def dispersion(arriving: Iterable[tuple[float, float]], batch: int = BATCH) -> float:
    """n times the squared relative standard error of the work that n requests bring in a second, from their
    times (s) and works.

    For independent gaps and lengths it is the sum of their squared coefficients of variation: 1 for Poisson
    arrivals of equal requests, 0 for equal ones at equal gaps. Estimated over batches of requests, so
    arrivals that depend on each other count with what they do to a whole batch. ValueError for fewer than
    two batches.
    """
    batches: list[tuple[float, float]] = []  # time and work
    began = done = 0.0
    for number, (at, seconds) in enumerate(arriving, 1):
        done += seconds
        if number % batch == 0:
            batches.append((at - began, done))
            began, done = at, 0.0
    if len(batches) < 2:
        raise ValueError(f"the dispersion needs at least two batches of {batch} requests")
    span, total = sum(t for t, _ in batches), sum(w for _, w in batches)
    load = total / span if span else 0.0
    rest = statistics.variance([w - load * t for t, w in batches])
    return batch * rest / (total / len(batches)) ** 2


def work(scene: Scene) -> Callable[[Seen], float]:
    """Instance seconds of a request: what no cache can have of its prompt in full steps, decodes in the
    fullest steps that keep the TPOT SLO."""
    truth = scene.machine.truth
    prompt, output = scene.workload.means()
    context = prompt + output / 2
    beside = max(1.0, min(float(scene.max_running), scene.machine.kv_capacity / context))
    while beside > 1.0 and truth.of(0, 0, beside, beside * context) > scene.loosest.tpot:
        beside = max(1.0, beside * 0.8)
    each = truth.of(FULL_STEP, 0, 0, 0) / FULL_STEP

    def seconds(one: Seen) -> float:
        prompt, decodes = one.call.prompt_tokens, one.call.output_tokens - 1
        new = prompt - one.tokens
        pairs = prompt_attention(prompt) - prompt_attention(one.tokens)
        attention = truth.of(new, pairs, 0, 0) - truth.of(new, 0, 0, 0)
        return (
            new * each
            + attention
            + decodes * truth.of(0, 0, beside, beside * (prompt + decodes / 2)) / beside
        )

    return seconds
