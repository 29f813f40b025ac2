"""Workloads made of others: several at once, or one after the other.

    mix:sharegpt@4,summarization@1             of five requests four are chat
    change:3658/100@1,661/257@5,3658/100@1     three parts, equally long; in the middle one five times as many

What stands behind an @ is a weight: of requests in a mix, of the rate in a change; 1 where it is left out.
Requests share no beginnings.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from taichi_serve.bench.arrivals import Arrivals, stream
from taichi_serve.bench.lengths import Independent, Source
from taichi_serve.cluster.simulated.job import Call

MIX, CHANGE = "mix", "change"


@dataclass(frozen=True, slots=True)
class Part:
    """What is asked there, and its weight."""

    source: Independent
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Mixed(Independent):
    """Each request is of one of the parts, drawn by their weights."""

    parts: tuple[Part, ...]

    def draw(self, chance: random.Random) -> Iterator[tuple[int, int]]:
        """Endless pairs. The n-th request of a part has the same lengths whatever the weights are."""
        every = [part.source.draw(random.Random(chance.random())) for part in self.parts]
        weights = [part.weight for part in self.parts]
        while True:
            (lengths,) = chance.choices(every, weights)
            yield next(lengths)


@dataclass(frozen=True, slots=True)
class Changing(Independent):
    """The parts follow each other, each as long as any other, at rates that are as their weights."""

    parts: tuple[Part, ...]

    def draw(self, chance: random.Random) -> Iterator[tuple[int, int]]:
        """The same lengths in no order."""
        return Mixed(self.parts).draw(chance)

    def calls(self, arrivals: Arrivals, rate: float, requests: int, seed: int) -> Iterator[Call]:
        """At `rate` requests/s over all of them; a part has as many of the requests as its weight says.

        Arrivals are drawn at one request/s, and time is then stretched in each part.
        """
        whole = sum(part.weight for part in self.parts)
        ends = [requests * weight / whole for weight in accumulate(part.weight for part in self.parts)]
        seconds = requests / rate / len(self.parts)
        drawn = [part.source.draw(stream(f"lengths {n}", seed)) for n, part in enumerate(self.parts)]
        for _, at in zip(range(requests), arrivals.times(stream("arrivals", seed)), strict=False):
            here = min(sum(at >= end for end in ends), len(ends) - 1)
            begin = ends[here - 1] if here else 0.0
            through = (at - begin) / (ends[here] - begin)
            yield Call((here + through) * seconds, *next(drawn[here]))


def compound(name: str, made: Callable[[str], Source | None]) -> Mixed | Changing | None:
    """From its name, with `made` for the names of its parts; None for a name of another kind."""
    kind, colon, words = name.partition(":")
    if not colon or kind not in (MIX, CHANGE):
        return None
    parts = tuple(_part(name, word.strip(), made) for word in words.split(","))
    if len(parts) < 2:
        raise ValueError(f"workload {name!r}: expected two parts or more, with commas between")
    return Mixed(parts) if kind == MIX else Changing(parts)


def _part(name: str, word: str, made: Callable[[str], Source | None]) -> Part:
    """From `661/257@5`."""
    what, at, said = word.partition("@")
    try:
        weight = float(said) if at else 1.0
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"workload {name!r}: {word!r}: expected a weight above 0 behind the @")
    source = made(what)
    if not isinstance(source, Independent):
        raise ValueError(
            f"workload {name!r}: {what!r} is no part: take sharegpt, summarization or means as in 1200/100"
        )
    return Part(source, weight)
