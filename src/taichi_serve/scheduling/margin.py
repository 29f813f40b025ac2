"""How much of the TTFT SLO is left where a prompt is placed: predictions are not exact.

It follows how often those that were accepted as in time were late, a little with each first token: so many of
them are late in the end that the two cancel out. It is bounded: whoever refuses all that would be late by
what was seen once sees nothing new, and nothing would ever correct it.
"""

from __future__ import annotations

LEAST, MOST = 0.05, 0.15  # shares of the SLO
LATE = 0.03  # share of the accepted that may be late
STEP = 0.004  # by which the margin grows with one that is


class Margin:
    """The share of the TTFT SLO that is left."""

    def __init__(self) -> None:
        self.share = LEAST

    def through(self, late: bool) -> None:
        """The first token of one that was predicted to be in time is out."""
        step = STEP if late else -STEP * LATE
        self.share = min(MOST, max(LEAST, self.share + step))
