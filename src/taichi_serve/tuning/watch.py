"""What became of the last requests: how much of either SLO they used, and what they asked for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from taichi_serve.messages import Arrived, Event, Finished, Outcome, Prefilled
from taichi_serve.slo import SLO

VIEWED = 600  # requests that a view is of at most
MOST = 4000  # requests that are remembered
ENOUGH_TOKENS = 16  # of an answer under way before its running TPOT says anything
SHARE = 0.9  # of the requests is to be good
TURNED_AWAY = 2.0  # such a request counts as one that took twice its TTFT SLO
Made = Callable[[str], int]  # output tokens so far of a request under way


@dataclass(slots=True, eq=False)
class Seen:
    """One request. Times in seconds on the cluster's clock, lengths in tokens."""

    name: str
    at: float
    prompt: int
    most: int
    blocks: tuple[int, ...] = ()
    first_at: float | None = None
    ended_at: float | None = None
    output: int = 0
    cached: int = 0
    refused: bool = False  # turned away: it is bad, and nobody knows how long its answer would have been
    void: bool = False  # it was cancelled or failed: that says nothing about sliders
    slo: SLO | None = None  # its own; None: the server's
    slo_class: str | None = None


@dataclass(frozen=True, slots=True)
class View:
    """The requests of a window: `ttft` and `tpot` are 90th percentiles, as shares of their SLO (1.0 is just
    kept), `late` and `slow` the shares that missed either, `good` the share of those judged that missed
    none."""

    ttfts: int  # requests whose TTFT is known, or known to be missed
    tpots: int
    judged: int
    ttft: float
    tpot: float
    late: float
    slow: float
    good: float


class Watch:
    """The last requests in order of arrival, fed with every fact."""

    def __init__(self) -> None:
        self.requests: deque[Seen] = deque(maxlen=MOST)
        self._live: dict[str, Seen] = {}

    def on(self, event: Event) -> None:
        """Book what a fact says of a request."""
        if isinstance(event, Arrived):
            if event.request not in self._live:
                seen = Seen(event.request, event.at, event.prompt_tokens, event.max_tokens, event.blocks)
                seen.slo, seen.slo_class = event.slo, event.slo_class
                self._live[event.request] = seen
                self.requests.append(seen)
        elif isinstance(event, Prefilled):
            seen_ = self._live.get(event.request)
            if seen_ is not None and seen_.first_at is None:
                seen_.first_at, seen_.cached = event.at, event.cached
        elif isinstance(event, Finished):
            ended = self._live.pop(event.request, None)
            if ended is not None and event.outcome is Outcome.REFUSED:
                ended.refused = True
            elif ended is not None:
                ended.ended_at, ended.output = event.at, event.output_tokens
                ended.void = event.outcome is not Outcome.FINISHED or ended.first_at is None

    def since(self, at: float) -> Iterator[Seen]:
        """Those that arrived then or later, the latest first."""
        for seen in reversed(self.requests):
            if seen.at < at:
                return
            if not seen.void:
                yield seen

    def view(self, now: float, slo: SLO, since: float, made: Made) -> View:
        """Of the requests that arrived since then; `slo` is that of those that have none of their own."""
        ttfts: list[float] = []
        tpots: list[float] = []
        judged = good = 0
        for seen in islice(self.since(since), VIEWED):
            ttft, tpot = used(seen, now, seen.slo or slo, made)
            if ttft is not None:
                ttfts.append(ttft)
            if tpot is not None:
                tpots.append(tpot)
            late = ttft is not None and ttft > 1
            if late or seen.ended_at is not None:
                judged += 1
                good += not late and (tpot is None or tpot <= 1)
        return View(
            len(ttfts),
            len(tpots),
            judged,
            percentile(ttfts, SHARE),
            percentile(tpots, SHARE),
            _above(ttfts),
            _above(tpots),
            good / judged if judged else 1.0,
        )


def used(seen: Seen, now: float, slo: SLO, made: Made) -> tuple[float | None, float | None]:
    """The shares of the TTFT and TPOT SLOs that a request has used; None while that is not known."""
    if seen.refused:
        return TURNED_AWAY, None
    if seen.first_at is None:
        waited = (now - seen.at) / slo.ttft
        return (waited if waited > 1 else None), None
    ttft = (seen.first_at - seen.at) / slo.ttft
    output = made(seen.name) if seen.ended_at is None else seen.output
    if seen.ended_at is None and output < ENOUGH_TOKENS:
        return ttft, None
    if output <= 1:
        return ttft, 0.0
    last = now if seen.ended_at is None else seen.ended_at
    return ttft, (last - seen.first_at) / (output - 1) / slo.tpot


def percentile(values: list[float], share: float) -> float:
    """The value that this share of them is at or below; 0.0 of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)] if ordered else 0.0


def _above(values: list[float]) -> float:
    return sum(value > 1 for value in values) / len(values) if values else 0.0
