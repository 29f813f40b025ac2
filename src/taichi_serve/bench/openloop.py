"""Send requests when they are due, whatever has become of the ones before; end when the outcome is certain.

Only the next turn of a conversation waits: for the answer, and then for its user. Prompts are token ids that
no other run had: the same ones twice would be answered from a prefix cache. Where one process cannot send so
much, several do (senders.py).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from taichi_serve.bench.client import Answer
from taichi_serve.bench.endpoint import Endpoint, Instances
from taichi_serve.bench.lateness import Core
from taichi_serve.bench.prompts import Prompts
from taichi_serve.bench.score import Key, Live, Score
from taichi_serve.bench.senders import Senders
from taichi_serve.bench.sending import First, Sending, Which
from taichi_serve.bench.sharing import requests
from taichi_serve.bench.workload import Workload
from taichi_serve.cluster.simulated.job import Call

LOOK = 0.2  # seconds between looks at what is late by now
Tell = Callable[[Score], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one seed sends: the first `warm_up` requests are not counted."""

    seed: int
    calls: Sequence[Call]
    warm_up: int = 0
    block_size: int = 16

    @classmethod
    def of(cls, workload: Workload, rate: float, warm_up: int, counted: int, seed: int) -> Plan:
        """Of a workload at `rate` requests/s."""
        calls = tuple(workload.calls(rate, warm_up + counted, seed))
        return cls(seed, calls, warm_up, workload.block_size)

    @property
    def total(self) -> int:
        """All requests, turns that follow others with them."""
        return len(requests(self.calls))

    @property
    def span(self) -> float:
        """Seconds over which counted requests are sent, if answers took no time."""
        times = [at for at, _ in requests(self.calls)]
        return times[-1] - times[self.warm_up]


class OpenLoop:
    """The load on one server."""

    def __init__(self, endpoint: Endpoint, salt: int | None = None, senders: int = 1) -> None:
        """With a `salt` the runs have the same tokens as those of another load with that salt. With several
        `senders` the requests are sent by as many processes beside this one."""
        self._endpoint, self._senders = endpoint, senders
        self._salts = random.Random(salt)

    async def instances(self) -> Instances:
        """The server's instances as they are now."""
        return await self._endpoint.instances()

    async def run(self, plan: Plan, score: Score, early: bool, tell: Tell) -> None:
        """Send all calls as soon as the server is idle.

        Returns when every counted request is good or cannot be any more, or, with `early`, as soon as the
        target is kept or missed for certain. What is under way then is aborted by closing its connection.
        Raises EndpointError where the server does not return what a next turn needs, and SenderError where
        a process that sends does not live to the end.
        """
        await self._endpoint.settle()
        salt, todo = self._salts.getrandbits(64), score.sent + plan.total - plan.warm_up

        def over() -> bool:
            if early and score.kept is not None:
                return True
            return score.sent == todo and not score.open

        count = min(self._senders, len(plan.calls))
        try:
            if count > 1:
                await Senders(self._endpoint, plan, score, salt, count).run(over, lambda: tell(score))
            else:
                await self._here(plan, score, salt, over, tell)
        finally:
            score.give_up()

    async def _here(self, plan: Plan, score: Score, salt: int, over: Callable[[], bool], tell: Tell) -> None:
        """From this process. The prompts are made before any is sent."""
        prompts = Prompts(salt, plan.block_size)
        firsts = [First(place, call, prompts.first(call)) for place, call in enumerate(plan.calls)]
        sending, core = Sending(self._endpoint, prompts, _Counted(plan, score)), Core()
        tasks = pending = sending.start(firsts, time.perf_counter())
        try:
            while pending and not over():
                done, pending = await asyncio.wait(pending, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                score.look(time.perf_counter())
                tell(score)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            score.used((core.share(),))


class _Counted:
    """Numbers requests in the order in which they are sent, and counts those behind the warm-up."""

    def __init__(self, plan: Plan, score: Score) -> None:
        self._plan, self._score = plan, score
        self._sent = 0
        self._keys: dict[Which, Key] = {}

    def waits(self, which: Which, due: float) -> None:
        """Nobody asks."""

    def begun(self, which: Which, live: Live, now: float) -> None:
        """One more."""
        number = self._sent
        self._sent += 1
        if number >= self._plan.warm_up:
            key = self._keys[which] = self._plan.seed, number
            self._score.begin(key, live, now)

    def ended(self, which: Which, live: Live, answer: Answer) -> None:
        """One of those that count is over."""
        if (key := self._keys.pop(which, None)) is not None:
            self._score.end(key, answer)
