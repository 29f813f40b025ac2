"""How many of the last requests kept their promises, over windows of time; and the times of the last ones.

A request counts at the moment it ends, by its own SLO or, without one, the server's of that moment. One that
failed kept its TTFT at most; one whose client left counts only where its first token was late by then. Memory
is bounded: sums by the second, and the last points.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from taichi_serve.messages import Arrived, Event, Finished, Prefilled
from taichi_serve.scheduling.headroom import NOBODY, Headroom
from taichi_serve.scheduling.verdict import judged
from taichi_serve.slo import SLO

MINUTE, TEN_MINUTES = 60, 600
WINDOWS = {"minute": MINUTE, "ten_minutes": TEN_MINUTES}
STRETCH = 10  # seconds of one entry of the history
POINTS = 2000  # requests whose times are remembered
GOOD = 0.9  # of requests: the share that a measured headroom is for


class Point(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request that ended at `at`: its TTFT and TPOT in seconds, and whether both were within the SLO."""

    at: float
    ttft: float
    tpot: float
    good: bool


@dataclass(slots=True)
class Sums:
    """Requests that ended: how many, and of these how many kept both SLOs (`good`), and either of them. The
    TPOT of `paced` of them can be judged."""

    requests: int = 0
    good: int = 0
    ttft: int = 0
    tpot: int = 0
    paced: int = 0

    def share(self, of: str) -> float | None:
        """The share, 0 to 1, that kept `of` (good, ttft or tpot); None where no request was judged."""
        judged = self.paced if of == "tpot" else self.requests
        kept: int = getattr(self, of)
        return kept / judged if judged else None

    def add(self, other: Sums) -> None:
        """These, too."""
        self.requests += other.requests
        self.good += other.good
        self.ttft += other.ttft
        self.tpot += other.tpot
        self.paced += other.paced


class Attainment:
    """Fed with every fact about requests; answers for any window up to ten minutes."""

    def __init__(self, promised: Callable[[], SLO]) -> None:
        """`promised` says the SLO that is in force for requests that have none of their own."""
        self._promised = promised
        # When it arrived, its first token, and its own SLO.
        self._live: dict[str, tuple[float, float | None, SLO | None]] = {}
        self._seconds: deque[tuple[int, Sums]] = deque(maxlen=TEN_MINUTES + 1)
        self.points: deque[Point] = deque(maxlen=POINTS)
        # When each ended, and the shares of its TTFT and TPOT SLO that it used.
        self._used: deque[tuple[float, float, float]] = deque(maxlen=POINTS)
        self.ended = 0  # points made so far, those that are forgotten too

    def on(self, event: Event) -> None:
        """Book what a fact says of a request."""
        if isinstance(event, Arrived):
            self._live.setdefault(event.request, (event.at, None, event.slo))
        elif isinstance(event, Prefilled):
            live = self._live.get(event.request)
            if live is not None and live[1] is None:
                self._live[event.request] = (live[0], event.at, live[2])
        elif isinstance(event, Finished):
            live = self._live.pop(event.request, None)
            if live is not None:
                self._judge(event, *live)

    def _judge(self, event: Finished, arrived_at: float, first_at: float | None, own: SLO | None) -> None:
        times = arrived_at, first_at, event.at
        slo = own or self._promised()
        verdict = judged(slo, event.outcome, *times, event.output_tokens)
        if verdict is None:
            return
        sums = self._second(int(event.at))
        sums.requests += 1
        sums.ttft += verdict.ttft
        if verdict.tpot is None:
            return
        sums.paced += 1
        sums.tpot += verdict.tpot
        sums.good += verdict.good
        if verdict.pace is not None and first_at is not None:
            self.points.append(Point(event.at, first_at - arrived_at, verdict.pace, verdict.good))
            used = (first_at - arrived_at) / slo.ttft, verdict.pace / slo.tpot
            self._used.append((event.at, *used))
            self.ended += 1

    def _second(self, at: int) -> Sums:
        if not self._seconds or self._seconds[-1][0] < at:
            self._seconds.append((at, Sums()))
        return self._seconds[-1][1]  # facts of several instances may be a moment out of order

    def window(self, now: float, seconds: int) -> Sums:
        """Of the requests that ended within the last `seconds` (whole ones, at most 600)."""
        total = Sums()
        for at, sums in reversed(self._seconds):
            if at <= int(now) - seconds:
                break
            total.add(sums)
        return total

    def headroom(self, now: float, seconds: float) -> Headroom:
        """What the 90th percentile of the requests that ended within the last `seconds` left of each SLO,
        every request by its own. Of the last 2,000 that finished at most; nothing where none did."""
        ttfts, tpots = [], []
        for at, ttft, tpot in reversed(self._used):
            if at <= now - seconds:
                break
            ttfts.append(ttft)
            tpots.append(tpot)
        return Headroom(1.0 - _high(ttfts), 1.0 - _high(tpots)) if ttfts else NOBODY

    def history(self, now: float) -> list[tuple[int, int]]:
        """Requests and good ones of each stretch of ten seconds, over ten minutes, the oldest first."""
        rows = [(0, 0)] * (TEN_MINUTES // STRETCH)
        for at, sums in self._seconds:
            back = (int(now) - at) // STRETCH
            if 0 <= back < len(rows):
                requests, good = rows[-1 - back]
                rows[-1 - back] = requests + sums.requests, good + sums.good
        return rows


def _high(values: list[float]) -> float:
    """The least of these that `GOOD` of them do not exceed."""
    return sorted(values)[math.ceil(GOOD * len(values)) - 1]
