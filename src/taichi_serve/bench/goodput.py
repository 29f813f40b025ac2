"""Attainment and what surrounds it, from facts alone: a Meter watches them on their way to the scheduler.

Attainment is the share of ALL requests sent that met both SLOs: one that failed, or never finished, is not
good. Memory stays flat: only live requests are kept, and times go into buckets 1 % wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from taichi_serve.cluster.base import Scheduler
from taichi_serve.messages import (
    Arrived,
    Command,
    Decode,
    Event,
    Finished,
    Flow,
    Flowed,
    Outcome,
    Prefilled,
    Stepped,
)
from taichi_serve.slo import SLO, tpot

WIDTH = math.log(1.01)


@dataclass(slots=True)
class Histogram:
    """Times in seconds, in buckets 1 % wide: quantiles are right to half a percent, the mean is exact."""

    count: int = 0
    total: float = 0.0
    most: float = 0.0
    buckets: dict[int, int] = field(default_factory=dict)

    def add(self, seconds: float) -> None:
        """Take a time; whatever is below a microsecond counts as one."""
        self.count += 1
        self.total += seconds
        self.most = max(self.most, seconds)
        bucket = round(math.log(max(seconds, 1e-6)) / WIDTH)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1

    @property
    def mean(self) -> float:
        """Seconds; NaN with nothing in it."""
        return self.total / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The time (seconds) that this share of all is at or below; NaN with nothing in it."""
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= share * self.count:
                return math.exp(bucket * WIDTH)
        return math.nan


@dataclass(slots=True)
class Tally:
    """What a run came to."""

    sent: int = 0
    done: int = 0
    good: int = 0
    bad: int = 0  # known not to be good, finished or not
    refused: int = 0  # turned away at the door; they are bad, too
    moves: dict[str, int] = field(default_factory=dict)
    ttft: Histogram = field(default_factory=Histogram)
    tpot: Histogram = field(default_factory=Histogram)
    gap: Histogram = field(default_factory=Histogram)
    busy: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    prompt_tokens: int = 0  # of prompts that are through
    cached_tokens: int = 0  # of these, not computed
    fetched_tokens: int = 0  # of those, copied from another instance
    in_time_tokens: int = 0  # of prompts whose first token kept its TTFT SLO
    first_at: float = 0.0
    last_at: float = 0.0
    classes: dict[str, Tally] = field(default_factory=dict)  # requests of each class, without steps and moves

    @property
    def hit_ratio(self) -> float:
        """Share of prompt tokens that did not have to be computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def attainment(self) -> float:
        """Share of all requests sent that met both SLOs."""
        return self.good / self.sent if self.sent else 0.0

    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the attainment."""
        return wilson(self.good, self.sent)


def wilson(good: int, sent: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share: stays within 0 and 1, and is honest at both ends."""
    if sent == 0:
        return 0.0, 1.0
    share = good / sent
    middle = share + z * z / (2 * sent)
    half = z * math.sqrt(share * (1 - share) / sent + z * z / (4 * sent * sent))
    below = 1 + z * z / sent
    return max(0.0, (middle - half) / below), min(1.0, (middle + half) / below)


@dataclass(slots=True)
class Live:
    """A request under way, and what it is judged by."""

    arrived_at: float
    slo: SLO
    tallies: tuple[Tally, ...]  # of all, and of its class
    prompt_tokens: int = 0
    first_at: float | None = None
    counted: bool = False  # already known to be bad

    def lose(self) -> None:
        """It cannot be good any more; it is counted once."""
        for tally in () if self.counted else self.tallies:
            tally.bad += 1
        self.counted = True


class Meter:
    """Stands between a cluster and a scheduler, and counts."""

    def __init__(self, scheduler: Scheduler, slo: SLO, lost_at: int | None = None, won_at: int = 0) -> None:
        """`slo` is that of requests that bring none. `decided` turns true once `lost_at` requests cannot
        be good any more, or `won_at` are good."""
        self.scheduler = scheduler
        self.slo = slo
        self.lost_at = lost_at
        self.won_at = won_at
        self.tally = Tally()
        self.live: dict[str, Live] = {}
        # Without first token, in order of arrival: for each TTFT SLO those that have it.
        self._unserved: dict[float, dict[str, None]] = {}

    @property
    def decided(self) -> bool:
        """Whether the target is out of reach, or reached, whatever comes."""
        if self.lost_at is None:
            return False
        return self.tally.bad >= self.lost_at or self.tally.good >= self.won_at

    def on(self, event: Event) -> Sequence[Command]:
        """Count the fact, and pass it on."""
        kind = type(event)
        if kind is Stepped:
            assert isinstance(event, Stepped)
            tally = self.tally
            tally.steps += 1
            tally.busy[event.instance] = tally.busy.get(event.instance, 0.0) + event.seconds
        elif kind is Arrived:
            assert isinstance(event, Arrived)
            self._arrived(event)
        elif kind is Prefilled:
            assert isinstance(event, Prefilled)
            self._first(event)
        elif kind is Finished:
            assert isinstance(event, Finished)
            self._finished(event)
        elif kind is Flowed:
            assert isinstance(event, Flowed)
            self.tally.gap.add(event.gap)
        commands = self.scheduler.on(event)
        for command in commands:
            if isinstance(command, (Flow, Decode)):
                moves = self.tally.moves
                moves[command.move.value] = moves.get(command.move.value, 0) + 1
        return commands

    def _arrived(self, event: Arrived) -> None:
        live = self.live[event.request] = Live(
            event.at, event.slo or self.slo, self._tallies(event.slo_class), event.prompt_tokens
        )
        for tally in live.tallies:
            if not tally.sent:
                tally.first_at = event.at
            tally.sent += 1
        self._unserved.setdefault(live.slo.ttft, {})[event.request] = None
        for ttft, unserved in self._unserved.items():
            while unserved:  # the oldest first, until one that is still in time
                name = next(iter(unserved))
                late = self.live[name]
                if event.at - late.arrived_at <= ttft:
                    break
                late.lose()
                del unserved[name]

    def _tallies(self, slo_class: str | None) -> tuple[Tally, ...]:
        """What counts a request of this class."""
        if slo_class is None:
            return (self.tally,)
        return self.tally, self.tally.classes.setdefault(slo_class, Tally())

    def _first(self, event: Prefilled) -> None:
        live, at = self.live.get(event.request), event.at
        if live is None or live.first_at is not None:
            return
        live.first_at = at
        self._unserved[live.slo.ttft].pop(event.request, None)
        in_time = at - live.arrived_at <= live.slo.ttft
        for tally in live.tallies:
            tally.ttft.add(at - live.arrived_at)
            tally.prompt_tokens += live.prompt_tokens
            tally.cached_tokens += event.cached
            tally.fetched_tokens += event.fetched
            tally.in_time_tokens += live.prompt_tokens if in_time else 0
        if not in_time:
            live.lose()

    def _finished(self, event: Finished) -> None:
        live = self.live.pop(event.request, None)
        if live is None:
            return
        self._unserved[live.slo.ttft].pop(event.request, None)
        good, first_at = False, live.first_at
        for tally in live.tallies:
            tally.done += 1
            tally.refused += event.outcome is Outcome.REFUSED
            tally.last_at = event.at
            if event.outcome is Outcome.FINISHED and first_at is not None:
                each = tpot(first_at, event.at, event.output_tokens)
                tally.tpot.add(each)
                good = live.slo.good(first_at - live.arrived_at, each)
                tally.good += good
        if not good:
            live.lose()
