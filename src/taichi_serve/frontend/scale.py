"""How many instances of which kind the last minutes asked for, read off the recorder (tuning/scale.py)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from taichi_serve.tuning.scale import FEWEST, WINDOW, Judged, Use, Wanted, wanted, working

if TYPE_CHECKING:
    from taichi_serve.frontend.record import Recorder
    from taichi_serve.sliders import Kind


def scale(recorder: Recorder, now: float) -> dict[Kind, Wanted]:
    """For each kind how many are there, and how many are wanted. Who is lost or drained is not there."""
    scheduler = recorder.scheduler
    instances = scheduler.instances.values()
    there = Counter(one.kind for one in instances if working(one))
    use, seconds = recorder.load.use(now, there), recorder.load.seconds(now)
    if seconds < FEWEST:
        why = f"it was counted for {seconds:.0f} s only"
        # Who is lost comes back by itself: nobody is to leave because of it, and nobody is to come.
        belong = zip(instances, scheduler.sliders.kinds(), strict=True)
        kept = Counter(kind for one, kind in belong if not one.draining)
        return {kind: Wanted(there[kind], kept[kind], Use(), why) for kind in use}
    sums = recorder.attainment.window(now, math.ceil(seconds))
    shares = {of: 1.0 if (share := sums.share(of)) is None else share for of in ("good", "ttft", "tpot")}
    return wanted(there, use, Judged(sums.requests, **shares))


def told(recorder: Recorder, now: float) -> dict[str, Any]:
    """The same as GET /taichi/scale says it."""
    found = scale(recorder, now)
    return {
        "window": WINDOW,
        "seconds": recorder.load.seconds(now),
        "wanted": sum(one.wanted for one in found.values()),
        "kinds": {kind.value: asdict(one) for kind, one in found.items()},
    }
