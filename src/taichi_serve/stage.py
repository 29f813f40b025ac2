"""The stages of a request's journey between engines: the words that the real and the simulated cluster share.

A stage says where a request is and what it waits for. The scheduler has states of its own (request.py), which
are coarser: it is told facts and does not see a leg being told to leave or its KV being pinned.
"""

from __future__ import annotations

from enum import Enum


class TransitionError(RuntimeError):
    """A state followed another that it must not follow: the books are wrong, and going on would hide it."""


class Stage(Enum):
    """Where a request is on its journey."""

    WAITING = "waiting"  # on no instance: it has just come, or its instance was lost
    PREFILLING = "prefilling"  # on an instance, in a leg without a token yet that computes its tokens (again)
    DECODING = "decoding"  # on an instance, in a leg that has made a token
    LEAVING = "leaving"  # told, or about to be told, to leave after the token that it is on
    HELD = "held"  # its leg is over and its KV waits at the source; where it goes is not decided yet
    LANDING = "landing"  # the next leg is at its target and its KV on the way: no token of it yet
    OVER = "over"


# The one table of legal steps. Whoever takes any other has lost count of what is true.
STAGES: dict[Stage, frozenset[Stage]] = {
    Stage.WAITING: frozenset({Stage.PREFILLING, Stage.LANDING, Stage.OVER}),
    Stage.PREFILLING: frozenset({Stage.PREFILLING, Stage.DECODING, Stage.HELD, Stage.WAITING, Stage.OVER}),
    Stage.DECODING: frozenset({Stage.LEAVING, Stage.PREFILLING, Stage.WAITING, Stage.OVER}),
    Stage.LEAVING: frozenset({Stage.DECODING, Stage.HELD, Stage.LANDING, Stage.WAITING, Stage.OVER}),
    Stage.HELD: frozenset({Stage.LANDING, Stage.PREFILLING, Stage.WAITING, Stage.OVER}),
    Stage.LANDING: frozenset({Stage.DECODING, Stage.PREFILLING, Stage.WAITING, Stage.OVER}),
    Stage.OVER: frozenset(),
}


def step(request: str, before: Stage, after: Stage) -> Stage:
    """`after`, if the table allows it after `before`; raises TransitionError with the name of the request."""
    if after not in STAGES[before]:
        raise TransitionError(f"request {request} went from {before.value} to {after.value}")
    return after
