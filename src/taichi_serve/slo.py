"""The two promises made to every request, in seconds: time to first token and time per output token."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SLO:
    """A request is good when its TTFT and its TPOT are both within these limits (seconds).

    TTFT runs from arrival to the first token; TPOT is (last token - first token) / (output tokens - 1),
    and is zero for a request of one token (paper, section 2).
    """

    ttft: float
    tpot: float

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} SLO must be a positive number of seconds, not {value!r}")

    def good(self, ttft: float, tpot: float) -> bool:
        """Whether a request with these two times (seconds) met both limits."""
        return ttft <= self.ttft and tpot <= self.tpot


DEFAULT = SLO(4.0, 0.07)  # where nobody says, and nobody knows better


def tpot(first_at: float, last_at: float, output_tokens: int) -> float:
    """Seconds per output token after the first; 0.0 for a request of at most one token."""
    return (last_at - first_at) / (output_tokens - 1) if output_tokens > 1 else 0.0
