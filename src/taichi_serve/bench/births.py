"""When conversations begin, so that all requests together come at one rate from the first second on.

In the long run a conversation of T turns on average must begin for every T requests. If it were so from the
start, the rate would climb for as long as conversations last: the first turns come alone at first. So more of
them begin at first. Where the number of turns is geometric and the next turn comes D seconds after the last
(exponential, with that mean), the rate of beginnings

    b(t) = R / T + R (1 - 1/T) exp(-t / D)

gives R requests/s at any time t: later turns come at R (1 - 1/T) (1 - exp(-t / D)), and that plus b(t) is R.
Answers are taken to need no time here: what they need delays later turns, and at first there are fewer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from taichi_serve.bench.arrivals import Arrivals

CLOSE = 1e-12  # of the number of requests, to which a time is solved for


@dataclass(frozen=True, slots=True)
class Births:
    """`rate` requests/s in conversations of so many `turns`, `between` seconds apart (means)."""

    rate: float
    turns: float = 1.0
    between: float = 0.0

    def times(self, arrivals: Arrivals, chance: random.Random) -> Iterator[float]:
        """When they begin (s), for ever; none at a rate of nought."""
        if self.rate <= 0:
            return
        at = 0.0
        for number in arrivals.times(chance):
            at = self.when(number, at)
            yield at

    def when(self, number: float, at: float = 0.0) -> float:
        """The time (s), not before `at`, by which so many are expected to have begun.

        Newton's method: the expected number is concave in time, so it nears the root from below only.
        """
        step = math.inf
        while step > CLOSE * (1.0 + at):
            step = (number - self.begun(at)) / self._slope(at)
            at += max(0.0, step)
        return at

    def begun(self, at: float) -> float:
        """How many are expected to have begun by then."""
        more = self.between * -math.expm1(-at / self.between) if self.between else 0.0
        return self.rate * (at / self.turns + (1 - 1 / self.turns) * more)

    def _slope(self, at: float) -> float:
        more = math.exp(-at / self.between) if self.between else 0.0
        return self.rate * (1 / self.turns + (1 - 1 / self.turns) * more)


@dataclass(slots=True)
class Born:
    """A conversation that begins at `at` (s), and how many of its turns there are; 0: one request alone."""

    at: float
    number: int
    turns: int


def within(
    requests: int,
    talks: Iterator[float],
    singles: Iterator[float],
    pauses: Callable[[int], Sequence[float]],
) -> list[Born]:
    """All that begins among the first `requests` requests, in order of time, where answers take no time.

    `talks` and `singles` are when conversations and requests alone begin; `pauses` are the seconds before
    each turn of a conversation by its number, the first one's with them.
    """
    made: list[Born] = []
    ahead: list[tuple[float, int, int]] = []  # when, number and turn of what comes next in a conversation
    counts = [0, 0]
    following = [next(talks, math.inf), next(singles, math.inf)]
    running: dict[int, Born] = {}
    for _ in range(requests):
        kind = 0 if following[0] <= following[1] else 1
        if ahead and ahead[0][0] <= following[kind]:
            at, number, turn = heappop(ahead)
            running[number].turns = turn + 1
        else:
            at, number, turn = following[kind], counts[kind], 0
            counts[kind] += 1
            following[kind] = next((talks, singles)[kind], math.inf)
            made.append(Born(at, number, 1 - kind))
            if kind:
                continue
            running[number] = made[-1]
        left = pauses(number)
        if turn + 1 < len(left):
            heappush(ahead, (at + left[turn + 1], number, turn + 1))
        else:
            del running[number]
    return made
