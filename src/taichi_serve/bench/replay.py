"""Hold the simulated engines to a recording of real ones: same arrivals, same decisions, same step durations.

From an event log (eventlog.py) come the arrivals, the length every request turned out to have, what was
decided after which fact, and how long every step took. The engines in miniature then say who is in which step
and when a token is out. With recorded durations as truth only that is judged; with a fitted model as truth,
its error is added.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from taichi_serve.bench.goodput import Histogram
from taichi_serve.cluster.base import run
from taichi_serve.cluster.simulated import Call, EngineShape, Link, SimulatedCluster
from taichi_serve.cluster.simulated.step import Truth
from taichi_serve.eventlog import Entry
from taichi_serve.messages import (
    Arrived,
    Command,
    Decode,
    Event,
    Finished,
    Flow,
    Flowed,
    Move,
    Outcome,
    Prefilled,
    Stepped,
)
from taichi_serve.sliders import Sliders
from taichi_serve.slo import tpot

Key = tuple[str, str, int]


class RecordedSteps:
    """A truth that gives back one instance's durations, in order: those of steps with prompt tokens apart
    from those without, so that one step more or less does not give a decode step the time of a prefill."""

    def __init__(self, steps: Iterable[Stepped]) -> None:
        """Without any step a duration of one millisecond is given."""
        steps = list(steps)
        self.mixed = deque(s.seconds for s in steps if s.prefill_tokens)
        self.plain = deque(s.seconds for s in steps if not s.prefill_tokens)
        self.typical = {
            True: statistics.fmean(self.mixed) if self.mixed else 0.001,
            False: statistics.fmean(self.plain) if self.plain else 0.001,
        }

    def of(self, prefill_tokens: float, attention: float, decodes: float, kv_tokens: float) -> float:
        """The next recorded duration of a step of this sort; when they are used up, their mean."""
        mixed = prefill_tokens > 0
        left = self.mixed if mixed else self.plain
        return left.popleft() if left else self.typical[mixed]


@dataclass(frozen=True)
class Times:
    """Seconds, over finished requests; and how often requests moved."""

    tpot_mean: float
    ttft_p50: float
    ttft_p90: float
    requests: int
    moves: int = 0  # that landed

    @classmethod
    def of(cls, events: Iterable[Event]) -> Times:
        """From the facts of a run or a recording."""
        arrived: dict[str, float] = {}
        first: dict[str, float] = {}
        ttft: list[float] = []
        each = Histogram()
        moves = 0
        for event in events:
            if isinstance(event, Arrived):
                arrived[event.request] = event.at
            elif isinstance(event, Prefilled) and event.request not in first:
                first[event.request] = event.at
            elif isinstance(event, Flowed):
                moves += 1
            elif isinstance(event, Finished) and event.outcome is Outcome.FINISHED and event.request in first:
                ttft.append(first[event.request] - arrived[event.request])
                each.add(tpot(first[event.request], event.at, event.output_tokens))
        if not ttft:
            raise ValueError("no request of the log was finished")
        ttft.sort()
        p50, p90 = ttft[len(ttft) // 2], ttft[min(len(ttft) - 1, len(ttft) * 9 // 10)]
        return cls(each.mean, p50, p90, len(ttft), moves)

    def errors(self, real: Times) -> dict[str, float]:
        """Relative errors against the recording: 0.03 is 3 % too long."""
        return {
            name: getattr(self, name) / getattr(real, name) - 1 if getattr(real, name) else 0.0
            for name in ("tpot_mean", "ttft_p50", "ttft_p90")
        }


class SameDecisions:
    """A scheduler that answers every fact as the recording did: the n-th of its sort about the same request
    or instance gets the commands that the n-th got there."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.answers: dict[Key, tuple[Command, ...]] = {}
        self.heard: list[Event] = []
        self._seen: Counter[tuple[str, str]] = Counter()
        for event, commands in entries:
            key = self._key(event)
            if commands:
                self.answers[key] = commands
        self._seen.clear()

    def on(self, event: Event) -> Sequence[Command]:
        """What was decided then."""
        self.heard.append(event)
        return self.answers.get(self._key(event), ())

    def _key(self, event: Event) -> Key:
        about = str(getattr(event, "request", "") or getattr(event, "instance", ""))
        kind = type(event).__name__
        self._seen[kind, about] += 1
        return kind, about, self._seen[kind, about]


def calls_of(entries: Sequence[Entry]) -> list[Call]:
    """The requests that were finished, with the lengths they turned out to have."""
    made = {e.request: e.output_tokens for e, _ in entries if isinstance(e, Finished)}
    return [
        Call(e.at, e.prompt_tokens, max(1, made[e.request]), e.request)
        for e, _ in entries
        if isinstance(e, Arrived) and e.request in made
    ]


def moved(entries: Iterable[Entry]) -> Counter[Move]:
    """How many moves were decided and landed, by why."""
    asked: dict[tuple[str, int], Move] = {}
    landed: Counter[Move] = Counter()
    for event, commands in entries:
        if isinstance(event, Flowed) and (why := asked.get((event.request, event.leg))):
            landed[why] += 1
        asked |= {(c.request, c.leg): c.move for c in commands if isinstance(c, Flow | Decode)}
    return landed


def again(
    entries: Sequence[Entry],
    sliders: Sliders,
    shape: EngineShape,
    truth: Truth | Sequence[Truth] | None = None,
) -> tuple[Times, Times]:
    """The times of the recording, and those of the same requests on engines in miniature.

    `shape` must have the real engines' KV blocks. `truth` is one for all instances or one for each; without
    it the recorded durations are used. A move takes what moves took there: the median gap, less the step that
    the first token came out of.
    """
    steps = [e for e, _ in entries if isinstance(e, Stepped)]
    gaps = [e.gap for e, _ in entries if isinstance(e, Flowed)]
    typical = statistics.median(s.seconds for s in steps) if steps else 0.0
    latency = max(0.0, statistics.median(gaps) - 1.5 * typical) if gaps else 0.0
    if truth is None:
        names = [f"i{number}" for number in range(sliders.instances)]
        truth = [RecordedSteps(s for s in steps if s.instance == name) for name in names]
    truths = truth if isinstance(truth, Sequence) else [truth]
    link = Link(bytes_per_token=0.0, bandwidth=1.0, latency=latency)
    cluster = SimulatedCluster(sliders, truths, shape, link, calls_of(entries))
    decisions = SameDecisions(entries)
    run(decisions, cluster)
    return Times.of(e for e, _ in entries), Times.of(decisions.heard)
