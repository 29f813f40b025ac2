"""Whether a request that is over kept its SLO: one rule for counters and for the live page."""

from __future__ import annotations

from typing import NamedTuple

from taichi_serve.messages import Outcome
from taichi_serve.slo import SLO, tpot


class Verdict(NamedTuple):
    """Whether a request kept its TTFT SLO, and its TPOT SLO: None where that cannot be said, for its client
    left. `pace` is its TPOT in seconds, where it came to its end."""

    ttft: bool
    tpot: bool | None
    pace: float | None = None

    @property
    def good(self) -> bool:
        """Whether both were kept."""
        return self.ttft and bool(self.tpot)


def judged(
    slo: SLO, outcome: Outcome, arrived_at: float, first_at: float | None, now: float, output_tokens: int
) -> Verdict | None:
    """The verdict on a request that is over `now` with so many tokens out; times in seconds on one clock.

    One that failed kept its TTFT SLO at most. One whose client left is not judged, unless its first token was
    late by then.
    """
    left = outcome is Outcome.CANCELLED
    waited = (now if first_at is None else first_at) - arrived_at
    late = waited > slo.ttft or (first_at is None and not left)
    if left:
        return Verdict(ttft=False, tpot=None) if late else None
    if first_at is None or outcome is not Outcome.FINISHED:
        return Verdict(not late, tpot=False)
    pace = tpot(first_at, now, output_tokens)
    return Verdict(not late, pace <= slo.tpot, pace)
