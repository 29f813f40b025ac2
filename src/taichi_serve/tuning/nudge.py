"""The fast loop: one SLO is short, the other has time to spare, so the D-heavy chunk takes a step.

A larger S_D computes prompts sooner and makes every token beside them later. Where both are short, or both
have time to spare, no chunk helps: that is for the slow loop (proposal.py).
"""

from __future__ import annotations

import math

from taichi_serve.tuning.setting import UNIT, Setting
from taichi_serve.tuning.steps import Done
from taichi_serve.tuning.watch import SHARE, View

ENOUGH = 20  # requests that both percentiles stand on
SHORT = 0.97  # of an SLO used by the 90th percentile: it is about to be missed
SPARE = 0.8  # of the other one: it has time to spare
MUCH = 0.6  # the same of TTFT while enough requests are good: what is cut off there comes back as a queue
PACED = 0.8  # of the TPOT SLO that a step of D-heavy instances takes: above, a smaller chunk is what helps
BAD = 0.03  # share of requests that miss the one before anything is done about it
CALM = 0.95  # share of good requests from which on no chunk becomes smaller: a queue would cost more
STEP = 4 / 3
CARRIED = 0.95  # of a chunk that prompts may fill, where only D-heavy instances compute them
WORSE = 0.05  # less of the requests are good than before a step: it is taken back


def harmed(view: View, before: float) -> bool:
    """Whether too few are good, and clearly fewer than the share that was `before` the last step."""
    return view.judged >= ENOUGH and view.good < min(SHARE, before - WORSE)


def nudge(view: View, done: Done, now: Setting, most: int) -> tuple[Setting, str] | None:
    """The setting with the chunk a step away, and why; None where it is to stay. `done` is by D-heavy
    instances of late: a TPOT can be short for other reasons than their steps (KV that is full, moves), and
    then no chunk helps. `most` tokens are the largest chunk that instances can take."""
    if min(view.ttfts, view.tpots) < ENOUGH:
        return None
    chunk = now.sliders.d_chunk
    spare = 0.0 if view.good >= CALM else MUCH if view.good >= SHARE else SPARE
    if chunk > UNIT and view.tpot > SHORT and view.slow > BAD and view.ttft < spare and done.pace > PACED:
        smaller = max(min(chunk / STEP, chunk - UNIT), _carried(done, now))
        wanted, why = min(chunk, smaller), "TPOT is short and TTFT has time to spare"
    elif view.ttft > SHORT and view.late > BAD and view.tpot < SPARE and done.pace < PACED:
        wanted, why = max(chunk * STEP, chunk + UNIT), "TTFT is short and TPOT has time to spare"
    else:
        return None
    there = now.with_d_chunk(max(UNIT, wanted), most)
    if there.sliders == now.sliders:
        return None
    return there, f"{why}: P90 at {view.ttft:.0%} of the TTFT and {view.tpot:.0%} of the TPOT SLO"


def _carried(done: Done, now: Setting) -> float:
    """The chunk below which a queue of prompts would grow; 0 where P-heavy instances take what is left."""
    return 0.0 if now.sliders.p_heavy else math.ceil(done.prompts / CARRIED / UNIT) * UNIT
