"""The decodes resident on one instance, in the two orders that Algorithm 1 asks for.

Every resident gets one token a step, so the order by output length and the order in which running TPOTs
cross a limit do not change while requests stay: both keys are static, and a step costs nothing per resident.

- Output so far is `base + (ticks - joined)`: longest first is the order of `joined - base`.
- The running TPOT has reached `pace` seconds when `now - first_at >= pace * (output - 1)`, that is when
  `now - pace * ticks >= first_at + pace * (base - joined - 1)`: the right side is the static `due`.

The pace is that of the request's own SLO, and the order by `due` is one among requests with the same pace:
there is a list for each pace, and a look at who crosses merges them.

Sorted lists and bisect: inserting shifts pointers, which for 10,000 residents takes about a microsecond.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from heapq import merge
from typing import TypeVar

from taichi_serve.messages import Move
from taichi_serve.request import Request


class Residents:
    """The movable requests that decode here: longest output first, and first to cross its TPOT limit first.
    Best effort comes before all others in the first order, and never crosses: it has nothing left to lose.

    The longest output has banked the most TPOT slack, and the more so the looser its TPOT SLO is: these come
    first. Those that may not be degraded any more are left out of that order, so that nobody has to pass them
    by in every step.
    """

    def __init__(self, alpha: float, max_degrades: int) -> None:
        """A request counts as crossing when its running TPOT has reached `alpha` of its TPOT SLO."""
        self.alpha = alpha
        self.max_degrades = max_degrades
        self._by_output: list[tuple[float, int, str]] = []  # the loosest first
        self._by_due: dict[float, list[tuple[float, str]]] = {}  # for each pace

    def __len__(self) -> int:
        return sum(len(ordered) for ordered in self._by_due.values())

    def renew(self, requests: Mapping[str, Request]) -> None:
        """The SLOs of those here may have changed: order them anew."""
        names = [name for ordered in self._by_due.values() for _, name in ordered]
        self._by_due, self._by_output = {}, []
        for name in names:
            self.add(requests[name])

    def add(self, request: Request) -> None:
        """Take in a movable request whose `base`, `joined` and `first_at` are set."""
        insort(self._by_due.setdefault(self.pace(request), []), (self.due(request), request.id))
        if self._degradable(request):
            insort(self._by_output, _by_output(request))

    def remove(self, request: Request) -> None:
        """Take out a request; its key fields must be as they were when it was added."""
        pace = self.pace(request)
        ordered = self._by_due[pace]
        _cut(ordered, (self.due(request), request.id))
        if not ordered:
            del self._by_due[pace]
        if self._degradable(request):
            _cut(self._by_output, _by_output(request))

    def _degradable(self, request: Request) -> bool:
        return request.moves.get(Move.DEGRADE, 0) < self.max_degrades

    def pace(self, request: Request) -> float:
        """The running TPOT (seconds per token) at which this request crosses."""
        return self.alpha * request.slo.tpot

    def due(self, request: Request) -> float:
        """The static key of the moment at which the running TPOT of `request` crosses (seconds)."""
        if request.best_effort:
            return math.inf
        assert request.first_at is not None
        return request.first_at + self.pace(request) * (request.base - request.joined - 1)

    def slack(self, request: Request, now: float, ticks: int) -> float:
        """Seconds the request could stand still for before its running TPOT crosses."""
        return self.due(request) + self.pace(request) * ticks - now

    def longest(self) -> Iterator[str]:
        """Request ids: best effort first, then the loosest TPOT SLO, then the longest output; ties
        by id."""
        return (name for *_, name in self._by_output)

    def everyone(self, now: float, ticks: int) -> list[str]:
        """All ids, the first to cross first."""
        every = ((ordered, now - pace * ticks) for pace, ordered in self._by_due.items())
        return [name for _, name in _soonest(every)]

    def crossing(self, now: float, ticks: int) -> Iterator[str]:
        """Ids of those whose running TPOT has crossed by now, the earliest first."""
        lines = ((ordered, now - pace * ticks) for pace, ordered in self._by_due.items())
        # Asked for in every step: where nobody crosses, one comparison for each pace is all.
        for slack, name in _soonest((ordered, line) for ordered, line in lines if ordered[0][0] <= line):
            if slack > 0:
                return
            yield name


def _by_output(request: Request) -> tuple[float, int, str]:
    looseness = math.inf if request.best_effort else request.slo.tpot
    return -looseness, request.joined - request.base, request.id


def _soonest(lists: Iterable[tuple[list[tuple[float, str]], float]]) -> Iterator[tuple[float, str]]:
    """The slack (seconds) of everybody on these lists, each with where its line stands; the least first."""
    return merge(*(_slacks(ordered, line) for ordered, line in lists))


def _slacks(ordered: list[tuple[float, str]], line: float) -> Iterator[tuple[float, str]]:
    for due, name in ordered:
        yield due - line, name


Key = TypeVar("Key", tuple[float, int, str], tuple[float, str])


def _cut(ordered: list[Key], key: Key) -> None:
    place = bisect_left(ordered, key)
    assert ordered[place] == key, "a resident's keys changed while it was in the list"
    del ordered[place]
