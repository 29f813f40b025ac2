"""The decodes resident on one instance, in the two orders that Algorithm 1 asks for.

Every resident gets one token a step, so the order by output length and the order in which running TPOTs
cross a limit do not change while requests stay: both keys are static, and a step costs nothing per resident.

- Output so far is `base + (ticks - joined)`: longest first is the order of `joined - base`.
- The running TPOT has reached `pace` seconds when `now - first_at >= pace * (output - 1)`, that is when
  `now - pace * ticks >= first_at + pace * (base - joined - 1)`: the right side is the static `due`.

Two sorted lists and bisect: inserting shifts pointers, which for 10,000 residents takes about a microsecond.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from typing import TypeVar

from taichi_serve.messages import Move
from taichi_serve.request import Request

FIRST = 1 << 40  # more tokens than any output has


class Residents:
    """The movable requests that decode here: longest output first, and first to cross its TPOT limit first.
    Best effort comes before all others in the first order, and never crosses: it has nothing left to lose.

    Those that may not be degraded any more are left out of the first order, so that nobody has to pass them
    by in every step.
    """

    def __init__(self, pace: float, max_degrades: int) -> None:
        """`pace` is the running TPOT (seconds per token) at which a request counts as crossing."""
        self.pace = pace
        self.max_degrades = max_degrades
        self._by_output: list[tuple[int, str]] = []
        self._by_due: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._by_due)

    def keep_pace(self, pace: float, requests: Mapping[str, Request]) -> None:
        """Cross at another running TPOT (seconds per token) from now on."""
        self.pace = pace
        self._by_due = sorted((self.due(requests[name]), name) for _, name in self._by_due)

    def add(self, request: Request) -> None:
        """Take in a movable request whose `base`, `joined` and `first_at` are set."""
        insort(self._by_due, (self.due(request), request.id))
        if self._degradable(request):
            insort(self._by_output, (_length(request), request.id))

    def remove(self, request: Request) -> None:
        """Take out a request; its key fields must be as they were when it was added."""
        _cut(self._by_due, (self.due(request), request.id))
        if self._degradable(request):
            _cut(self._by_output, (_length(request), request.id))

    def _degradable(self, request: Request) -> bool:
        return request.moves.get(Move.DEGRADE, 0) < self.max_degrades

    def due(self, request: Request) -> float:
        """The static key of the moment at which the running TPOT of `request` crosses (seconds)."""
        if request.best_effort:
            return math.inf
        assert request.first_at is not None
        return request.first_at + self.pace * (request.base - request.joined - 1)

    def slack(self, request: Request, now: float, ticks: int) -> float:
        """Seconds the request could stand still for before its running TPOT crosses."""
        return self.due(request) + self.pace * ticks - now

    def longest(self) -> Iterator[str]:
        """Request ids, best effort first, then the longest output; ties by id."""
        return (name for _, name in self._by_output)

    def everyone(self) -> list[str]:
        """All ids, the first to cross first."""
        return [name for _, name in self._by_due]

    def crossing(self, now: float, ticks: int) -> Iterator[str]:
        """Ids of those whose running TPOT has crossed by now, the earliest first."""
        line = now - self.pace * ticks
        for due, name in self._by_due:
            if due > line:
                return
            yield name


def _length(request: Request) -> int:
    """The static key of its output, the longest first."""
    return request.joined - request.base - (FIRST if request.best_effort else 0)


Key = TypeVar("Key", tuple[int, str], tuple[float, str])


def _cut(ordered: list[Key], key: Key) -> None:
    place = bisect_left(ordered, key)
    assert ordered[place] == key, "a resident's keys changed while it was in the list"
    del ordered[place]
