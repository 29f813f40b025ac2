"""Where a request stands on its way through instances: a word that the real cluster and the simulated one
share."""

from __future__ import annotations

from enum import Enum


class Stage(Enum):
    """The stages of a request's journey."""

    WAITING = "waiting"  # on no instance: it arrived, or its instance was lost
    PREFILLING = "prefilling"  # a leg without a token yet: its prompt, or its tokens so far, are computed
    DECODING = "decoding"  # a token a step
    LEAVING = "leaving"  # it still decodes, and is about to go elsewhere
    HELD = "held"  # its leg is over and its KV waits; nobody has said where to
    LANDING = "landing"  # its next leg is at the target, its KV on the way, no token yet
    OVER = "over"
