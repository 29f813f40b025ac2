"""When a lost instance is started again, and when that is hopeless. No I/O; time is an argument, in seconds.

The first start after a loss comes at once, and each further one within the hour waits longer: 1, 2, 4 ... 60
seconds. After so many starts in an hour the instance stays out: what ends it so often needs a person.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

HOUR = 3600.0
LONGEST_DELAY = 60.0
GUESS = 60.0  # seconds that a start takes, as long as none was measured


class Standing(Enum):
    """How an instance stands."""

    UP = "up"
    WAITING = "waiting"  # lost; its next start is due later
    STARTING = "starting"
    OUT = "out"  # it is not started any more


@dataclass(slots=True)
class Place:
    """One instance, whatever process runs it."""

    standing: Standing = Standing.UP
    starts: deque[float] = field(default_factory=deque)  # when it was started again, in the last hour
    restarts: int = 0  # that succeeded, since the server began
    lost_at: float | None = None
    why: str | None = None  # of its last loss
    due: float = 0.0  # while it waits: when it is started
    began: float = 0.0  # while it starts: when that began


class Supervisor:
    """Decides for every instance. `restarts` is how often each may be started again in an hour, 0 for
    never; `took` what the first start of the server took."""

    def __init__(self, names: Iterable[str], restarts: int, took: float = GUESS) -> None:
        self.places = {name: Place() for name in names}
        self.limit = restarts
        self.took = took  # seconds, the last start that succeeded

    def add(self, name: str) -> None:
        """One more instance, which serves."""
        self.places[name] = Place()

    def remove(self, name: str) -> None:
        """An instance left for good."""
        self.places.pop(name, None)

    def lost(self, name: str, why: str, at: float) -> float | None:
        """It died, or its start failed: the seconds until it is to be started, None if it stays out."""
        place = self.places[name]
        place.why = why
        if place.standing is Standing.UP:
            place.lost_at = at
        while place.starts and at - place.starts[0] >= HOUR:
            place.starts.popleft()
        made = len(place.starts)
        if made >= self.limit:
            place.standing = Standing.OUT
            return None
        delay = 0.0 if made == 0 else min(LONGEST_DELAY, 2.0 ** min(made - 1, 10))
        place.standing, place.due = Standing.WAITING, at + delay
        return delay

    def starting(self, name: str, at: float) -> None:
        """Its next process is being started."""
        place = self.places[name]
        place.standing, place.began = Standing.STARTING, at
        place.starts.append(at)

    def back(self, name: str, at: float) -> None:
        """It serves again."""
        place = self.places[name]
        place.standing = Standing.UP
        place.restarts += 1
        self.took = at - place.began

    def due(self, name: str, at: float) -> float | None:
        """Seconds until one that is lost is to be started, None if it stays out."""
        place = self.places[name]
        if place.standing is Standing.OUT:
            return None
        return max(0.0, place.due - at) if place.standing is Standing.WAITING else 0.0

    def explain(self, name: str, why: str) -> None:
        """More is known about its last loss."""
        self.places[name].why = why

    def returns(self, name: str, at: float) -> float | None:
        """Seconds until it is expected to serve: 0 where it does, None where it will not."""
        place = self.places[name]
        match place.standing:
            case Standing.UP:
                return 0.0
            case Standing.WAITING:
                return max(0.0, place.due - at) + self.took
            case Standing.STARTING:
                return max(1.0, place.began + self.took - at)
            case Standing.OUT:
                return None

    def retry_after(self, at: float) -> int | None:
        """Whole seconds until the first is expected to serve, at least 1; None when that is hopeless."""
        times = [seconds for name in self.places if (seconds := self.returns(name, at)) is not None]
        return max(1, math.ceil(min(times))) if times else None

    @property
    def hopeless(self) -> bool:
        """Whether all are out."""
        return all(place.standing is Standing.OUT for place in self.places.values())
