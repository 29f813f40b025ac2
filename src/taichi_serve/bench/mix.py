"""Requests of several classes: which class each of a workload's requests has, and so which SLO."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from taichi_serve.bench.arrivals import stream
from taichi_serve.classes import DEFAULT, Classes, SLOClass
from taichi_serve.cluster.simulated.job import Call
from taichi_serve.slo import SLO


@dataclass(frozen=True, slots=True)
class Part:
    """A class, the SLO of its requests, and its part of all requests beside those of the other classes; and
    what may become of them under overload (see SLOClass)."""

    name: str
    slo: SLO
    share: float = 1.0
    weight: float = 1.0
    refuse: bool = True
    demote: bool = True


@dataclass(frozen=True, slots=True)
class Mix:
    """The classes of a workload's requests; with none all are of one class, and have the server's SLO."""

    parts: tuple[Part, ...] = ()

    @classmethod
    def of(cls, classes: Classes, server: SLO) -> Mix:
        """Classes as a server has them, in the shares that they have."""
        return cls(
            tuple(
                Part(one.name, one.slo(server) or server, one.share, one.weight, one.refuse, one.demote)
                for one in classes.values()
            )
        )

    @property
    def classes(self) -> tuple[SLOClass, ...]:
        """Them, as a scheduler knows them."""
        return tuple(map(_known, self.parts))

    def over(self, calls: Iterable[Call], seed: int) -> Iterator[Call]:
        """The same calls, each with a class: all turns of a conversation have that of its first. Which it is
        depends on the seed and the number of the call alone, so it is the same at every rate."""
        if not self.parts:
            yield from calls
            return
        chance = stream("classes", seed)
        for call in calls:
            yield _of(call, self._drawn(chance))

    def _drawn(self, chance: random.Random) -> Part:
        (drawn,) = chance.choices(self.parts, [part.share for part in self.parts])
        return drawn

    @property
    def words(self) -> str:
        """For whoever reads the figures."""
        whole = sum(part.share for part in self.parts)
        return ", ".join(
            f"{part.share / whole:.0%} {part.name} ({part.slo.ttft:g} s and {part.slo.tpot * 1e3:g} ms)"
            for part in self.parts
        )


def _known(part: Part) -> SLOClass:
    ttft, tpot = (None, None) if part.name == DEFAULT else (part.slo.ttft, part.slo.tpot)  # the server's
    return SLOClass(part.name, ttft, tpot, weight=part.weight, refuse=part.refuse, demote=part.demote)


def _of(call: Call, part: Part) -> Call:
    turns = [call]
    while (following := turns[-1].then) is not None:
        turns.append(following)
    made: Call | None = None
    for turn in reversed(turns):
        made = replace(turn, then=made, slo=part.slo, slo_class=part.name)
    assert made is not None
    return made
