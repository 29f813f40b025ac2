"""The fast loop: one SLO is short, the other has time to spare, so the D-heavy chunk takes a step.

A larger S_D computes prompts sooner and makes every token beside them later. Where both are short, or both
have time to spare, no chunk helps: that is for the slow loop (proposal.py).
"""

from __future__ import annotations

from taichi_serve.tuning.setting import UNIT, Setting
from taichi_serve.tuning.watch import View

ENOUGH = 20  # requests that both percentiles stand on
SHORT = 0.97  # of an SLO used by the 90th percentile: it is about to be missed
SPARE = 0.8  # of the other one: it has time to spare
PACED = 0.8  # of the TPOT SLO that a step of D-heavy instances takes: above, a smaller chunk is what helps
BAD = 0.03  # share of requests that miss the one before anything is done about it
STEP = 4 / 3


def nudge(view: View, pace: float, now: Setting, most: int) -> tuple[Setting, str] | None:
    """The setting with the chunk a step away, and why; None where it is to stay. `pace` is the share of the
    TPOT SLO that steps of D-heavy instances took lately: a TPOT can be short for other reasons (KV that is
    full, moves), and then no chunk helps. `most` tokens are the largest chunk that instances can take."""
    if min(view.ttfts, view.tpots) < ENOUGH:
        return None
    chunk = now.sliders.d_chunk
    if chunk > UNIT and view.tpot > SHORT and view.slow > BAD and view.ttft < SPARE and pace > PACED:
        wanted, why = min(chunk / STEP, chunk - UNIT), "TPOT is short and TTFT has time to spare"
    elif view.ttft > SHORT and view.late > BAD and view.tpot < SPARE and pace < PACED:
        wanted, why = max(chunk * STEP, chunk + UNIT), "TTFT is short and TPOT has time to spare"
    else:
        return None
    there = now.with_d_chunk(max(UNIT, wanted), most)
    if there.sliders == now.sliders:
        return None
    return there, f"{why}: P90 at {view.ttft:.0%} of the TTFT and {view.tpot:.0%} of the TPOT SLO"
