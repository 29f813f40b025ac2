"""How long the cluster waits for somebody before it goes on without them."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_SILENCE = 1.0
LONGEST_MOVE = 3600.0


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds, both. `move_timeout` is for KV that should come, `stall_timeout` for an instance with work.

    Raises ValueError, naming the flag, where waiting that long makes no sense: a user waits as
    long as a move does, and every instance is silent for a moment.
    """

    move_timeout: float
    stall_timeout: float

    def __post_init__(self) -> None:
        if not 0 < self.move_timeout <= LONGEST_MOVE:
            raise ValueError(
                f"--move-timeout must be above 0 and at most {LONGEST_MOVE:g} seconds, "
                f"not {self.move_timeout!r}"
            )
        if not (math.isfinite(self.stall_timeout) and self.stall_timeout >= LEAST_SILENCE):
            raise ValueError(
                f"--stall-timeout must be a number of at least {LEAST_SILENCE:g} seconds, "
                f"not {self.stall_timeout!r}"
            )
