"""What another setting would have made of the last requests: they are played again to engines in miniature.

The scheduler is the one that serves and the cluster is the simulated one (cluster/simulated); the step times
are what is believed of the instances, corrected by what they were seen to take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from taichi_serve.cluster.simulated import Call, EngineShape, Link, SimulatedCluster
from taichi_serve.latency.fit import Sample, fit
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.profile import Transfer
from taichi_serve.latency.profiled import Profiled
from taichi_serve.messages import Arrived, Command, Event, Finished, Prefilled
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind
from taichi_serve.slo import SLO, tpot
from taichi_serve.tuning.setting import Setting
from taichi_serve.tuning.watch import SHARE, percentile

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
SKIPPED = 0.25  # of the requests of a rehearsal: it begins with an empty cluster, which serves well
HOPELESS = 0.25  # of those judged are bad: it ends


@dataclass(frozen=True, slots=True)
class Past:
    """Requests as they came, `calls` in order of time (seconds from 0) within `span` seconds. They share
    prefixes where they have blocks."""

    calls: tuple[Call, ...]
    span: float

    @property
    def rate(self) -> float:
        """Requests/s."""
        return len(self.calls) / self.span

    @property
    def shares(self) -> bool:
        """Whether any have blocks."""
        return any(call.blocks for call in self.calls)

    def again(self, load: float, count: int) -> Iterator[Call]:
        """So many of them, over and over, `load` times as fast. One that comes again shares nothing with
        itself: else all of it would be cached."""
        for number in range(count):
            lap, place = divmod(number, len(self.calls))
            call = self.calls[place]
            mark = lap * GOLDEN & MASK
            blocks = tuple(block ^ mark for block in call.blocks) if lap else call.blocks
            at = (lap * self.span + call.at) / load
            own = blocks, None, call.slo, call.slo_class
            yield Call(at, call.prompt_tokens, call.output_tokens, "", True, *own)


@dataclass(frozen=True, slots=True)
class Limits:
    """What instances can hold and take, in tokens and requests; they are all alike."""

    kv_capacity: int
    max_running: int
    max_model_len: int
    max_chunk: int
    block_size: int
    bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Corrected:
    """What a model says of steps, times `mixed` with prompt tokens in them and times `plain` without."""

    model: Roofline
    mixed: float
    plain: float

    def of(self, prefill_tokens: float, attention: float, decodes: float, kv_tokens: float) -> float:
        """Seconds of a step with this work."""
        seconds = self.model.of(prefill_tokens, attention, decodes, kv_tokens)
        return seconds * (self.mixed if prefill_tokens else self.plain)


@dataclass(frozen=True, slots=True)
class Plant:
    """The instances, all alike: `model` says what steps take, with prompt tokens in them times `p_mixed` on
    a P-heavy and `d_mixed` on a D-heavy one, without times `plain`, as was observed; how KV moves between
    two of them. Where there is no model it is to be fitted to `steps`."""

    model: Roofline | None
    steps: tuple[Sample, ...]
    p_mixed: float
    d_mixed: float
    plain: float
    limits: Limits
    transfers: tuple[Transfer, ...]

    def kind(self, kind: Kind) -> Corrected:
        """Step times of one kind of instance: the truth of a rehearsal."""
        assert self.model is not None, "it is fitted before anything is rehearsed"
        mixed = self.p_mixed if kind is Kind.P_HEAVY else self.d_mixed
        return Corrected(self.model, mixed, self.plain)

    def fitted(self) -> Plant:
        """The same with a model. Raises ValueError where there are too few steps for one."""
        return self if self.model is not None else replace(self, model=fit(self.steps), steps=())

    @property
    def limit(self) -> int:
        """Tokens of prompt and output together that a request may have."""
        size = self.limits.block_size
        return min(self.limits.max_model_len, self.limits.kv_capacity // size * size)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a rehearsal came to: the share of good requests, how much of its scarcer SLO the 90th percentile
    used (1.0: just kept), and how many facts it took, which is what it costs."""

    good: float
    used: float
    facts: int = 0

    @property
    def held(self) -> bool:
        """Whether enough are good."""
        return self.good >= SHARE

    @property
    def key(self) -> tuple[bool, float]:
        """The highest stands best: of those that hold, the one with most left of its scarcer SLO."""
        return self.held, -self.used if self.held else self.good


class Judge:
    """Stands between the engines in miniature and the scheduler, and counts who is good."""

    def __init__(self, scheduler: GlobalScheduler, slo: SLO, first: int, count: int) -> None:
        """Judged are the requests from number `first` on, of `count` in all, each by its own SLO; `slo` is
        that of those that have none."""
        self.scheduler = scheduler
        self.slo = slo
        self.first, self.count = first, count - first
        self.facts = self.arrived = self.good = self.bad = 0
        self.ttfts: list[float] = []
        self.tpots: list[float] = []
        self._live: dict[str, list[float]] = {}  # arrival, and the first token
        self._own: dict[str, SLO] = {}

    def on(self, event: Event) -> Sequence[Command]:
        """Count the fact, and pass it on."""
        kind = type(event)
        self.facts += 1
        if kind is Arrived:
            assert isinstance(event, Arrived)
            if self.arrived >= self.first:
                self._live[event.request] = [event.at]
                if event.slo is not None:
                    self._own[event.request] = event.slo
            self.arrived += 1
        elif kind is Prefilled:
            assert isinstance(event, Prefilled)
            times = self._live.get(event.request)
            if times is not None and len(times) == 1:
                times.append(event.at)
        elif kind is Finished:
            assert isinstance(event, Finished)
            self._finished(event)
        return self.scheduler.on(event)

    def _finished(self, event: Finished) -> None:
        times = self._live.pop(event.request, None)
        slo = self._own.pop(event.request, self.slo)
        if times is None or len(times) < 2:
            return
        ttft, each = times[1] - times[0], tpot(times[1], event.at, event.output_tokens)
        self.ttfts.append(ttft / slo.ttft)
        self.tpots.append(each / slo.tpot)
        good = slo.good(ttft, each)
        self.good += good
        self.bad += not good

    @property
    def hopeless(self) -> bool:
        """Whether so many are bad that the rest does not matter."""
        return self.bad > HOPELESS * self.count

    def standing(self) -> Standing:
        """As far as it was seen; of one that was hopeless the rest counts as bad."""
        worst = max(percentile(self.ttfts, SHARE), percentile(self.tpots, SHARE))
        return Standing(self.good / self.count, worst, self.facts)


def rehearse(
    plant: Plant, past: Past, slo: SLO, policy: Policy, setting: Setting, load: float, count: int
) -> Standing:
    """Play `count` of the past requests again at `load` times their rate, under this setting."""
    sliders, link = setting.sliders, plant.transfers[0]
    truths = {kind: plant.kind(kind) for kind in Kind}
    cluster = SimulatedCluster(
        sliders,
        [truths[kind] for kind in sliders.kinds()],
        EngineShape(plant.limits.kv_capacity, plant.limits.max_running, plant.limits.block_size),
        Link(plant.limits.bytes_per_token, link.bytes_per_second, link.latency),
        past.again(load, count),
        max_model_len=plant.limits.max_model_len,
    )
    transfers = {(t.source, t.target): t for t in plant.transfers}
    assert plant.model is not None
    predictor = Profiled(plant.model, transfers, plant.limits.bytes_per_token)
    known = plant.limits.block_size if past.shares else 0
    policy, seats = setting.policy(policy), plant.limits.max_running
    scheduler = GlobalScheduler(sliders, slo, predictor, policy, cluster.capacities, known, seats)
    judge = Judge(scheduler, slo, int(SKIPPED * count), count)
    for event in cluster.facts():
        for command in judge.on(event):
            cluster.send(command)
        if judge.hopeless:
            cluster.close()
    return judge.standing()
