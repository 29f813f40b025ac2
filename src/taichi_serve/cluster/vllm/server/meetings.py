"""Who has met whom: an instance is let in when it has moved requests to and from everybody who answers.

Whom it could not meet because that one was silent it meets when that one answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterable
from typing import Protocol

from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.scratch import Say
from taichi_serve.cluster.vllm.server.warm import LateError, Pair, Rehearsing, meet

MEET_SECONDS = 60.0  # that a new incarnation may take to move requests to and from everybody else


class Cluster(Rehearsing, Protocol):
    """What is needed of the cluster."""

    engines: list[Engine]


class Meetings:
    """The meetings of one server. `silent` are those that do not answer at present."""

    def __init__(self, cluster: Cluster, silent: Collection[Engine], say: Say) -> None:
        self.one_by_one = asyncio.Lock()  # two that come must meet each other, too
        self._cluster = cluster
        self._silent = silent
        self._say = say
        self._unmet: list[Pair] = []  # of which one was silent when the other came

    async def meet(self, engine: Engine) -> None:
        """Move requests to and from everybody who answers. Raises StartError where that fails, and the fault
        is its own only while they do."""
        while True:
            others = [e for e in self._cluster.engines if e.alive and e.index != engine.index]
            here = [other for other in others if other not in self._silent]
            try:
                await meet(self._cluster, [engine], both_ways([engine], here), MEET_SECONDS)
            except LateError as late:
                self._say(f"instance {engine.name} serves without having met everybody: {late}")
            except StartError:
                if engine.alive and any(not e.alive or e in self._silent for e in here):
                    continue
                raise
            self._unmet += both_ways([engine], [e for e in others if e not in here])
            return

    def owed(self, engine: Engine) -> bool:
        """Whether somebody came while it was silent."""
        return any(engine in pair for pair in self._unmet)

    async def make_up(self, engine: Engine) -> None:
        """Have it meet whoever came while it was silent."""
        async with self.one_by_one:
            pairs = [pair for pair in self._unmet if engine in pair and all(e.alive for e in pair)]
            self.forget(engine)
            with contextlib.suppress(StartError):  # then its moves are given up one by one, after their time
                await meet(self._cluster, [], pairs, MEET_SECONDS)

    def forget(self, engine: Engine) -> None:
        """It is gone, and meets nobody."""
        self._unmet = [pair for pair in self._unmet if engine not in pair]


def both_ways(some: Iterable[Engine], others: Iterable[Engine]) -> list[Pair]:
    """Every pair of one of these and one of those, in both directions."""
    those = list(others)
    return [pair for one in some for other in those for pair in ((one, other), (other, one))]
