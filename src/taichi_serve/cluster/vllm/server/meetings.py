"""Who has met whom: an instance is let in when it has moved requests to and from everybody who answers.

Whom it could not meet because that one was silent it meets when that one answers again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from typing import Protocol

from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.scratch import Say
from taichi_serve.cluster.vllm.server.warm import LateError, Pair, Rehearsing, meet

AGAIN = 0.5  # seconds until one that could not answer is asked again
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
        """Move requests to and from everybody who answers, also who does so again before this is over. Raises
        StartError where that fails, and the fault is its own only while they do."""
        met: set[Engine] = set()
        alone = [engine]
        while True:
            others = [e for e in self._cluster.engines if e.alive and e.index != engine.index]
            here = [other for other in others if other not in self._silent and other not in met]
            if not here and not alone:
                self._unmet += both_ways([engine], [e for e in others if e not in met])
                return
            try:
                await meet(self._cluster, alone, both_ways([engine], here), MEET_SECONDS)
            except LateError as late:
                self._say(f"instance {engine.name} serves without having met everybody: {late}")
                here = [other for other in here if other not in self._silent]
            except StartError:
                if engine.alive and any(not e.alive or e in self._silent for e in here):
                    continue
                raise
            met.update(here)
            alone = []

    def owed(self, engine: Engine) -> bool:
        """Whether somebody who answers came while it was silent."""
        return bool(self._due(engine))

    async def catch_up(self, engine: Engine) -> None:
        """Come back when it has met whoever came while it was silent, and has answered after that: what it
        said before says nothing of now. Whom it cannot meet because that one is silent by now, those two
        still owe each other; and it owes all of them where this is cancelled, because it is silent again."""
        while True:
            if not await _well(engine):
                await asyncio.sleep(AGAIN)
            elif self.owed(engine):
                async with self.one_by_one:
                    await self._make_up(engine)
            else:
                return

    async def _make_up(self, engine: Engine) -> None:
        pairs = self._due(engine)
        try:
            await meet(self._cluster, [], pairs, MEET_SECONDS)
        except StartError:  # then its moves are given up one by one, after their time
            pairs = [pair for pair in pairs if not self._silent_beside(engine, pair)]
        self._unmet = [pair for pair in self._unmet if pair not in pairs]

    def _due(self, engine: Engine) -> list[Pair]:
        """Its pairs of which both are there."""
        own = [pair for pair in self._unmet if engine in pair and all(e.alive for e in pair)]
        return [pair for pair in own if not self._silent_beside(engine, pair)]

    def _silent_beside(self, engine: Engine, pair: Pair) -> bool:
        return any(other in self._silent for other in pair if other is not engine)

    def forget(self, engine: Engine) -> None:
        """It is gone, and meets nobody."""
        self._unmet = [pair for pair in self._unmet if engine not in pair]


async def _well(engine: Engine) -> bool:
    """Whether it answers and does not fail. One that is silent does not come back from here, and it is the
    watch that says so."""
    try:
        await engine.answers()
    except Exception:  # noqa: BLE001  vLLM raises Exception for a call that failed: no sign of life
        return not engine.alive  # who is gone is waited for no more
    return True


def both_ways(some: Iterable[Engine], others: Iterable[Engine]) -> list[Pair]:
    """Every pair of one of these and one of those, in both directions."""
    those = list(others)
    return [pair for one in some for other in those for pair in ((one, other), (other, one))]
