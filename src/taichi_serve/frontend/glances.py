"""How the instances are and what changes slowly, as the page shows it, read off the running system."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from taichi_serve.dashboard.attainment import WINDOWS
from taichi_serve.dashboard.feed import FETCH, Feed
from taichi_serve.dashboard.rows import Glance, Standing
from taichi_serve.messages import Move
from taichi_serve.sliders import OFF, ON, SUGGEST

if TYPE_CHECKING:
    from taichi_serve.frontend.system import System


def feed_of(system: System) -> Feed:
    """A feed of this system, which nobody tells facts yet."""
    recorder = system.recorder
    look, stand = partial(glances, system), partial(standing, system)
    return Feed(system.scheduler, recorder.attainment, look, stand, recorder.happened)


def glances(system: System) -> list[Glance]:
    """All instances, in order. It walks no requests: it is asked four times a second."""
    now, recorder, supervisor = time.monotonic(), system.recorder, system.keeper.supervisor
    found = []
    for engine in system.engines:
        ledger, place = system.scheduler.instances[engine.name], supervisor.places[engine.name]
        found.append(
            Glance(
                name=engine.name,
                kind=ledger.kind.value,
                chunk=ledger.chunk,
                standing=place.standing.value,
                alive=engine.alive,
                silent=ledger.silent,
                draining=ledger.draining,
                restarts=place.restarts,
                back_in=supervisor.returns(engine.name, now),
                lost=place.why,
                running=engine.running,
                waiting=engine.waiting,
                decodes=ledger.decodes,
                arriving=ledger.arriving,
                queued_prefill_tokens=ledger.queued_prefill_tokens,
                kv_tokens=engine.kv_tokens,
                kv_capacity=engine.kv_capacity,
                ticks=ledger.ticks,
                steps=recorder.steps[engine.name],
                prefill_tokens=recorder.prefill_tokens[engine.name],
                output_tokens=recorder.output_tokens[engine.name],
            )
        )
    return found


def standing(system: System, now: float) -> Standing:
    """What changes slowly."""
    recorder, scheduler, tuner = system.recorder, system.scheduler, system.tuner
    sums = {name: recorder.attainment.window(now, seconds) for name, seconds in WINDOWS.items()}
    sliders = scheduler.sliders
    return Standing(
        ttft=scheduler.slo.ttft,
        tpot=scheduler.slo.tpot,
        p_heavy=sliders.p_heavy,
        d_heavy=sliders.d_heavy,
        p_chunk=sliders.p_chunk,
        d_chunk=sliders.d_chunk,
        max_chunk=system.max_chunk,
        watermark=scheduler.policy.watermark,
        autotune=OFF if tuner is None else (ON if tuner.act else SUGGEST),
        accepted=recorder.accepted,
        live=len(scheduler.requests),
        moves={**{move.value: recorder.moves[move] for move in Move}, FETCH: recorder.fetches},
        windows={
            name: (of.requests, of.share("good"), of.share("ttft"), of.share("tpot"))
            for name, of in sums.items()
        },
        history=recorder.attainment.history(now),
    )
