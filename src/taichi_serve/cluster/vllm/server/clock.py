"""A clock that stands still while this process does.

A debugger, a snapshot or a suspended container can stop the whole machine for minutes. Everybody else stood
still too, so nobody was silent and nothing is overdue. Time is counted in small ticks of a task of the
server: a tick that took much longer than asked for counts as a short one.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from typing import Any

TICK = 0.25  # seconds asked for
LONGEST = 2 * TICK  # what one tick counts at most
JUMP = 2.0  # seconds after which a tick was a pause, and whoever is asked for an answer is asked anew


class Timer:
    """A call that is due at a time of the clock, until it is cancelled."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call: Callable[[], Any] | None = call

    def cancel(self) -> None:
        """Do not call."""
        self._call = None

    def fire(self) -> None:
        """Call, once."""
        call, self._call = self._call, None
        if call is not None:
            call()


class Patience:
    """Seconds that this process has been there to see. `read` is the time outside, in seconds.

    Whoever waits for somebody else waits on this clock: `call_later` is asyncio's, but for pauses.
    """

    def __init__(self, read: Callable[[], float] = time.monotonic) -> None:
        self.now = 0.0
        self.resumed = 0.0  # when the last pause ended
        self._read = read
        self._seen = read()
        self._order = itertools.count()
        self._due: list[tuple[float, int, Timer]] = []

    def call_later(self, seconds: float, call: Callable[..., Any], *args: Any) -> Timer:
        """Have `call(*args)` made when so many seconds have been seen; up to one tick late."""
        timer = Timer(lambda: call(*args))
        heapq.heappush(self._due, (self.now + seconds, next(self._order), timer))
        return timer

    def tick(self) -> None:
        """Count the time since the last tick, and make the calls that are due."""
        seen, self._seen = self._seen, self._read()
        passed = self._seen - seen
        self.now += min(passed, LONGEST)
        if passed > JUMP:
            self.resumed = self.now
        while self._due and self._due[0][0] <= self.now:
            heapq.heappop(self._due)[2].fire()

    async def run(self) -> None:
        """Tick for ever."""
        while True:
            await asyncio.sleep(TICK)
            self.tick()
