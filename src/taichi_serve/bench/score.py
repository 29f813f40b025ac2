"""What a run at one rate came to, request by request, and whether its outcome is certain already.

A request that failed, or was refused, is bad. One that is under way is bad as soon as it cannot be good any
more: its first token is late, or its last one is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from taichi_serve.bench.client import Answer
from taichi_serve.bench.goodput import wilson
from taichi_serve.bench.lateness import Lateness, busiest
from taichi_serve.slo import SLO, tpot

Key = tuple[int, int]  # seed, number
# A run that is shorter sees neither a queue that grows nor the load that remains once the first requests end.
LEAST_SECONDS, LEAST_REQUESTS = 60.0, 10.0  # seconds, and times the mean request
DRIFT = 0.05  # a machine whose speed moved by more than this share was not the same for two measurements


@dataclass(frozen=True, slots=True)
class Sample:
    """A request that has ended. TTFT (seconds) counts from when it was due: a late client hides nothing."""

    seed: int
    number: int
    prompt_tokens: int
    output_tokens: int
    ttft: float | None
    tpot: float | None
    good: bool
    error: str | None
    cached_tokens: int | None = None  # of the prompt; None where the server does not say
    slo_class: str | None = None

    @classmethod
    def of(cls, key: Key, live: Live, answer: Answer, slo: SLO) -> Sample:
        """From the answer, by its own SLO, or this one where it has none. With another number of tokens than
        were asked for it is a failure."""
        slo = live.slo or slo
        error = answer.error or (None if answer.ok else "it ended without a finish reason")
        if error is None and answer.output_tokens != live.output_tokens:
            error = f"{answer.output_tokens} tokens came, {live.output_tokens} were asked for"
        first = answer.times[0] - live.due if answer.times else None
        each = tpot(answer.times[0], answer.times[-1], live.output_tokens) if answer.times else None
        good = error is None and first is not None and each is not None and slo.good(first, each)
        lengths = live.prompt_tokens, live.output_tokens
        return cls(*key, *lengths, first, each, good, error, answer.cached_tokens, live.slo_class)


@dataclass(slots=True)
class Live:
    """A request under way: when it was due, what it asked for, and what has come."""

    due: float
    prompt_tokens: int
    output_tokens: int
    answer: Answer | None = None  # from its first token on
    slo: SLO | None = None  # its own
    slo_class: str | None = None

    def lost(self, now: float, slo: SLO) -> bool:
        """Whether it cannot be good any more, whatever comes; `slo` counts where it has none of its own."""
        slo = self.slo or slo
        if self.answer is None:
            return now - self.due > slo.ttft
        first = self.answer.times[0]
        if first - self.due > slo.ttft:
            return True
        out = max(len(self.answer.tokens), len(self.answer.times))
        return out < self.output_tokens and now - first > slo.tpot * (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Run:
    """One rate: `total` requests were to be sent; the rest of a run that was decided early is not known."""

    rate: float
    total: int
    sent: int
    good: int
    bad: int
    kept: bool
    seconds: float
    lag: float  # seconds that the client was late with a request, at worst
    samples: tuple[Sample, ...]
    span: float | None = None  # seconds over which counted requests are sent, for each seed; None: not known
    lost: tuple[str, ...] = ()  # instances of the server that were not there all the time
    drift: float = 0.0  # how far the machine's speed moved in its rounds, at most; 0.0 where nobody looked
    lateness: Lateness | None = None  # of the load generator; None: not known

    @classmethod
    def of(cls, parts: Sequence[Run], attainment: float) -> Run:
        """Rounds at one rate, taken together; `kept` is what all of them say."""
        total, good = sum(part.total for part in parts), sum(part.good for part in parts)
        spans = [part.span for part in parts if part.span is not None]
        return cls(
            parts[0].rate,
            total,
            sum(part.sent for part in parts),
            good,
            sum(part.bad for part in parts),
            good >= needed(attainment, total),
            sum(part.seconds for part in parts),
            max(part.lag for part in parts),
            tuple(sample for part in parts for sample in part.samples),
            min(spans) if spans else None,
            tuple(sorted({name for part in parts for name in part.lost})),
            max(part.drift for part in parts),
            Lateness.worst([part.lateness for part in parts]),
        )

    @property
    def whole(self) -> bool:
        """Whether every request was seen to be good or bad."""
        return self.good + self.bad == self.total

    @property
    def least(self) -> float:
        """The attainment, if none of the unknown requests is good."""
        return self.good / self.total

    @property
    def most(self) -> float:
        """The attainment, if all of the unknown requests are good."""
        return 1 - self.bad / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval; with unknown requests, from the worst case's to the best case's."""
        return wilson(self.good, self.total)[0], wilson(self.total - self.bad, self.total)[1]

    @property
    def failed(self) -> int:
        """Requests that were refused or broke off."""
        return sum(sample.error is not None for sample in self.samples)

    @property
    def cached(self) -> float | None:
        """The share of prompt tokens that were cached, of requests that ended properly; None where the server
        did not say. vLLM says it with --enable-prompt-tokens-details."""
        ended = [sample for sample in self.samples if sample.error is None]
        if all(sample.cached_tokens is None for sample in ended):
            return None
        return sum(s.cached_tokens or 0 for s in ended) / sum(s.prompt_tokens for s in ended)

    @property
    def mean(self) -> float:
        """Seconds that a request took that ended properly, on average; 0.0 where none did."""
        took = [
            sample.ttft + sample.tpot * (sample.output_tokens - 1)
            for sample in self.samples
            if sample.error is None and sample.ttft is not None and sample.tpot is not None
        ]
        return sum(took) / len(took) if took else 0.0

    @property
    def remarks(self) -> tuple[str, ...]:
        """What makes its figures doubtful: what it was too short for, instances that were lost, a machine or
        a load generator that was not what it should be."""
        said = [f"lost {' '.join(self.lost)}"] if self.lost else []
        if self.span is not None and self.span < max(LEAST_SECONDS, LEAST_REQUESTS * self.mean):
            long = f" for requests of {self.mean:.3g} s" if self.span >= LEAST_SECONDS else ""
            said.append(f"too short: {self.span:.3g} s of traffic{long}")
        if self.drift > DRIFT:
            said.append(f"the machine's speed moved by {self.drift:.0%}")
        if self.lateness is not None and self.lateness.remark is not None:
            said.append(self.lateness.remark)
        return tuple(said)

    def times(self, name: str) -> list[float]:
        """TTFT or TPOT (seconds) of all requests that ended properly, ascending."""
        return sorted(getattr(sample, name) for sample in self.samples if sample.error is None)

    def quantile(self, name: str, share: float) -> float | None:
        """The time that this share of all requests sent kept to; None where too few of them ended."""
        times = self.times(name)
        place = math.ceil(share * self.sent - 1e-9)
        return times[place - 1] if 0 < place <= len(times) else None


def needed(attainment: float, total: int) -> int:
    """So many of `total` requests must be good."""
    return math.ceil(attainment * total - 1e-9)


@dataclass(frozen=True, slots=True)
class Others:
    """Requests of the same rate in other rounds, to come ones too, and what is known of them."""

    total: int = 0
    good: int = 0
    bad: int = 0


class Score:
    """Counts the requests of one rate: of all its seeds, or of one where the rest is known from elsewhere."""

    def __init__(self, slo: SLO, total: int, attainment: float, others: Others = Others()) -> None:
        """`total` requests will be sent; the target is that this share of them and the others is good."""
        self.slo, self.total, self.others = slo, total, others
        self.needed = needed(attainment, total + others.total) - others.good
        self.spare = total + others.total - needed(attainment, total + others.total) - others.bad
        self.sent = self.good = 0
        self.late: list[float] = []  # seconds that each request was sent behind its schedule
        self.busy: tuple[float, ...] = ()  # share of a core of each sender, when it was busiest
        self.live: dict[Key, Live] = {}
        self.lost: set[Key] = set()  # known to be bad before their end
        self.samples: list[Sample] = []

    @property
    def lag(self) -> float:
        """Seconds that the latest request was sent behind its schedule."""
        return max(self.late, default=0.0)

    @property
    def bad(self) -> int:
        """Known not to be good, ended or not."""
        return len(self.samples) - self.good + len(self.lost)

    @property
    def kept(self) -> bool | None:
        """Whether the target is kept; None while that is open."""
        if self.good >= self.needed:
            return True
        return False if self.bad > self.spare else None

    @property
    def open(self) -> int:
        """Requests under way that may still be good."""
        return sum(key not in self.lost for key in self.live)

    def begin(self, key: Key, live: Live, now: float) -> None:
        """A request is sent."""
        self.sent += 1
        self.late.append(max(0.0, now - live.due))  # a timer may be early by less than its clock can tell
        self.live[key] = live

    def end(self, key: Key, answer: Answer) -> None:
        """Its answer is over, however."""
        self.add(key, Sample.of(key, self.live[key], answer, self.slo))

    def add(self, key: Key, sample: Sample) -> None:
        """The same, where somebody else has made a sample of it."""
        del self.live[key]
        self.lost.discard(key)
        self.good += sample.good
        self.samples.append(sample)

    def look(self, now: float) -> None:
        """Find those that cannot be good any more."""
        self.lose(key for key, live in self.live.items() if live.lost(now, self.slo))

    def lose(self, keys: Iterable[Key]) -> None:
        """These are under way, and cannot be good any more."""
        self.lost.update(keys)

    def used(self, busy: tuple[float, ...]) -> None:
        """What the senders of one seed took of their cores."""
        self.busy = busiest((self.busy, busy))

    def give_up(self) -> None:
        """All that is under way was aborted: what was not lost already stays unknown."""
        self.live.clear()

    def run(self, rate: float, seconds: float) -> Run:
        """What it came to."""
        counts = self.total, self.sent, self.good, self.bad
        lag, lateness = self.lag, Lateness.of(self.late, self.busy)
        return Run(rate, *counts, bool(self.kept), seconds, lag, tuple(self.samples), lateness=lateness)
