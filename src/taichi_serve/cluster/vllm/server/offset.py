"""Times of another host as times of the server's. `time.monotonic()` counts from the start of a host, so what
an engine on another one says of when something happened means nothing here, nor on a third."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs

WINDOW = 30.0  # seconds; two of them are remembered, as no two clocks go equally fast for long


@dataclass(slots=True)
class Offset:
    """What is to be added to times of one host. The word that was under way for the shortest time tells it
    best, and is wrong by that time: on a network of one place a fraction of a millisecond."""

    seconds: float = 0.0
    _least: float = inf
    _before: float = inf
    _began: float = -inf

    def heard(self, said: float, now: float) -> None:
        """What was said at this time there is here now."""
        if now - self._began >= WINDOW:
            self._before, self._least, self._began = self._least, now - said, now
        else:
            self._least = min(self._least, now - said)
        self.seconds = min(self._before, self._least)

    def here(self, at: float) -> float:
        """That time there, as a time here; 0 says that there is none."""
        return at + self.seconds if at else 0.0


def arrived(outputs: EngineCoreOutputs, offset: Offset, now: float) -> None:
    """These came from there just now: the times in them that vLLM's front end compares with others become
    times of this host."""
    offset.heard(outputs.timestamp, now)
    outputs.timestamp = offset.here(outputs.timestamp)
    for output in outputs.outputs:
        for event in output.events or ():
            event.timestamp = offset.here(event.timestamp)
