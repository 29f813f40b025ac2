"""Whether an instance still answers. No I/O; times are seconds of a clock that stands still with the server.

Every output of a step is a sign of life, of the engine core and of its workers. Where none comes for ASK
seconds the instance is asked: the engine core answers between two steps, and each worker from a thread of
its own. It is silent when it has said nothing for SILENCE seconds. A step can last longer than that on slow
devices, so it may also take three times as long as its long steps usually do: the third longest of the last
100, which no stop of a process in the middle of a step makes longer. What is longer still (a first
compilation) looks like silence, and costs little: work goes elsewhere until the instance answers. It is
ended only after the stall time.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

ASK = 1.0
SILENCE = 6.0
REMEMBERED = 100


class Verdict(Enum):
    """What is to be done about an instance now."""

    ASK = "ask"
    SILENT = "silent"
    STALLED = "stalled"


class Pulse:
    """Of one incarnation. `stall` is how long it may be silent before it counts as lost, in seconds."""

    def __init__(self, now: float, stall: float) -> None:
        self.stall = stall
        self.silent = False
        self.asked = False  # and not yet answered
        self.heard_at = now
        self._long: deque[float] = deque(maxlen=REMEMBERED)

    def heard(self, now: float, busy: bool = False) -> bool:
        """A sign of life; `busy` if it is an output. True when it ends a silence."""
        if busy:
            self._long.append(now - self.heard_at)
        self.heard_at = now
        was, self.silent = self.silent, False
        return was

    def answered(self, now: float) -> bool:
        """The answer to a question. True when it ends a silence."""
        self.asked = False
        return self.heard(now)

    def quiet(self, now: float, resumed: float) -> float:
        """Seconds without a sign of life, since the last pause of the server at most."""
        return now - max(self.heard_at, resumed)

    @property
    def allowance(self) -> float:
        """Seconds that it may say nothing."""
        usual = sorted(self._long)[-3] if len(self._long) >= 3 else 0.0
        return min(max(SILENCE, 3.0 * usual), self.stall)

    def look(self, now: float, resumed: float) -> Verdict | None:
        """What to do at `now`, where the server's last pause ended at `resumed`: after one, an answer is
        waited for anew before anything is said of anybody."""
        quiet = self.quiet(now, resumed)
        if quiet >= self.allowance:
            if now - self.heard_at >= self.stall:
                return Verdict.STALLED
            if not self.silent:
                self.silent = True
                return Verdict.SILENT
        if quiet >= ASK and not self.asked:
            self.asked = True
            return Verdict.ASK
        return None
