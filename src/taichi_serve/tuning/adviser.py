"""Who answers the questions of the slow loop: a port of two methods, and one that answers on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from taichi_serve.tuning.proposal import Proposal, Question, propose


class Adviser(Protocol):
    """Whoever answers questions to the slow loop, somewhere else and some time later. `took` is the processor
    time (seconds) of the last answer."""

    took: float

    def ask(self, now: float, question: Question) -> None:
        """Take a question; the one before, if it is open, is forgotten."""
        ...

    def answer(self, now: float) -> Proposal | None:
        """What came of it, once; None while there is nothing."""
        ...


@dataclass
class AtOnce:
    """An adviser that answers in this process, and is listened to `delay` seconds later: for simulations."""

    delay: float = 5.0
    took: float = 0.0
    asked: int = 0
    _open: tuple[float, Proposal] | None = None

    def ask(self, now: float, question: Question) -> None:
        """Answer it."""
        self.asked += 1
        self._open = now + self.delay, propose(question)

    def answer(self, now: float) -> Proposal | None:
        """The answer, when it is time."""
        if self._open is None or now < self._open[0]:
            return None
        proposal, self._open = self._open[1], None
        return proposal
