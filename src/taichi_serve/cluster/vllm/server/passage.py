"""The KV of one leg on its way to the next, and the one rule about it: a source holds what somebody may read
until nobody reads it any more, and never until a clock says so.

Full blocks never change, so most of them are copied while the request still runs at its source:

    source                          server                           target
    pin full blocks        <------  Pin            ASKED
                                    _have          COPYING  -- Add, Copy --->  keeps blocks, copies
    leaves after its token <------  copied         READY    <- Copied -------
    last token             ------>  left           TAIL     -- Copy (note) -->  copies the tail
                                                            -- Arrive ------->  is in the next step
    lets go                <------  first token    CLOSED

A prefix that is fetched goes from ASKED to COPYING to CLOSED (fetching.py).

Where nothing was copied ahead the target pulls all of it when it has the request (PULLING). Whatever ends it
early makes it DROPPING: the target says when nothing is read or written any more, and only then the source
lets go. The death of either side is such an answer, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from taichi_serve.cluster.vllm.server.acts import Acts, Close, Drop, Seat
from taichi_serve.stage import TransitionError


class Passing(Enum):
    """How far it is."""

    ASKED = "asked"  # the source is asked what is full, or tells it unasked
    COPYING = "copying"  # the target has the leg, and blocks are on their way
    READY = "ready"  # all full blocks are there
    TAIL = "tail"  # the source made its last token, and what is missing is on its way
    PULLING = "pulling"  # the target reads all of it by itself
    DROPPING = "dropping"  # not wanted any more; the target has not said yet that it is over
    CLOSED = "closed"  # nobody reads, and the source knows


PASSINGS: dict[Passing, frozenset[Passing]] = {
    Passing.ASKED: frozenset({Passing.COPYING, Passing.CLOSED}),
    Passing.COPYING: frozenset({Passing.READY, Passing.DROPPING, Passing.CLOSED}),
    Passing.READY: frozenset({Passing.TAIL, Passing.DROPPING, Passing.CLOSED}),
    Passing.TAIL: frozenset({Passing.DROPPING, Passing.CLOSED}),
    Passing.PULLING: frozenset({Passing.DROPPING, Passing.CLOSED}),
    Passing.DROPPING: frozenset({Passing.CLOSED}),
    Passing.CLOSED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Times:
    """What the copiers said of the copying; see messages.Timeline."""

    began: float = 0.0
    copied: float = 0.0
    tail_began: float = 0.0
    landed: float = 0.0
    blocks: int = 0
    seconds: float = 0.0


class Passage:
    """From the leg `source_leg` at `source` to the leg `reader` at `target`."""

    __slots__ = (
        "found", "known", "owns", "passing", "reader", "request", "room", "source", "source_leg", "target",
        "times",
    )  # fmt: skip

    def __init__(
        self,
        request: str,
        reader: str,
        source: Seat,
        source_leg: str,
        target: Seat,
        passing: Passing = Passing.ASKED,
    ) -> None:
        self.request = request
        self.reader = reader
        self.source = source
        self.source_leg = source_leg
        self.target = target
        self.passing = passing
        self.owns = passing is Passing.PULLING  # whether the source has left, and its KV is held for this
        self.known = 0  # output tokens that the target was sent
        self.room = 0  # tokens more that it keeps blocks for
        self.found = 0  # blocks that its source has of a prefix
        self.times = Times()

    def enter(self, passing: Passing) -> None:
        """The one writer of `passing`. Raises TransitionError."""
        if passing not in PASSINGS[self.passing]:
            raise TransitionError(f"{self.reader} went from {self.passing.value} to {passing.value}")
        self.passing = passing

    @property
    def ready(self) -> bool:
        """Whether only the tail is missing."""
        return self.passing is Passing.READY

    @property
    def landing(self) -> bool:
        """Whether the source has left and the target is at it."""
        return self.passing in (Passing.TAIL, Passing.PULLING)

    def suffers(self, seat: Seat) -> bool:
        """Whether the loss of this instance ends it. A target that is at the tail finds out by itself that
        its source is gone: the bytes may be there already."""
        return seat is self.target or (seat is self.source and not self.landing)

    def drop(self) -> Acts:
        """It is not wanted any more."""
        if self.passing is Passing.ASKED or not self.target.alive:
            return self.close()
        copied = self.passing is not Passing.PULLING
        self.enter(Passing.DROPPING)
        return [Drop(self, copied)]

    def close(self) -> Acts:
        """Nothing is read for it any more, or it never was."""
        self.enter(Passing.CLOSED)
        return [Close(self)]
