"""The state of the whole system as one JSON object."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import asdict, replace
from itertools import permutations
from typing import TYPE_CHECKING, Any

from taichi_serve.classes import SLOClass
from taichi_serve.cluster.vllm.server.passage import Passing
from taichi_serve.cluster.vllm.server.supervisor import Standing
from taichi_serve.dashboard.attainment import MINUTE, WINDOWS
from taichi_serve.messages import Move, Outcome
from taichi_serve.scheduling.counters import Attained
from taichi_serve.scheduling.headroom import best, predicted, typical
from taichi_serve.scheduling.policy import BLIND, FETCH, KNOWN, Policy
from taichi_serve.sliders import OFF, ON, SUGGEST
from taichi_serve.stage import Stage

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.server.engine import Engine
    from taichi_serve.dashboard.attainment import Attainment
    from taichi_serve.frontend.record import Recorder
    from taichi_serve.frontend.system import System


SHOWN = 20  # changes of sliders
HERE = (Stage.PREFILLING, Stage.DECODING, Stage.LEAVING, Stage.HELD, Stage.LANDING)
UNDER_WAY = (Passing.COPYING, Passing.READY, Passing.TAIL, Passing.PULLING)


def state(system: System) -> dict[str, Any]:
    """Sliders, SLO, instances and counters. Counters start with the server."""
    recorder, places = system.recorder, _places(system)
    processes = system.front.processes()
    return {
        "sliders": asdict(system.scheduler.sliders),
        "slo": asdict(system.scheduler.slo),
        "classes": _classes(system),
        "policy": _policy(system.scheduler.policy),
        "attainment": attainment(system.recorder.attainment, time.monotonic()),
        "headroom": headroom(recorder, time.monotonic()),
        "prefixes": _prefixes(system),
        "instances": [_instance(system, engine, places) for engine in system.engines],
        "elastic": _elastic(system),
        "requests": {
            "accepted": recorder.accepted,
            "live": recorder.accepted - recorder.outcomes.total(),
            **{outcome.value: recorder.outcomes[outcome] for outcome in Outcome},
        },
        "moves": {
            **{move.value: recorder.moves[move] for move in Move},
            "bytes": recorder.moved_bytes,
            "recomputes": recorder.recomputes,
            "fetches": recorder.fetches,
            "median_gap": statistics.median(recorder.gaps) if recorder.gaps else None,
        },
        "bound": dict(recorder.bound),
        "kv_paths": _kv_paths(system.cluster.engines),
        "autotune": _autotune(system),
        "viewers": system.viewers.count,
        **({"front_ends": processes} if processes else {}),
    }


def attainment(seen: Attainment, now: float) -> dict[str, Any]:
    """Of the requests that ended in the last minute and the last ten: how many, and which share of them kept
    both SLOs (`good`), TTFT and TPOT; null where none ended."""
    found = {}
    for name, seconds in WINDOWS.items():
        sums = seen.window(now, seconds)
        shares = {of: sums.share(of) for of in ("good", "ttft", "tpot")}
        found[name] = {"seconds": seconds, "requests": sums.requests, **shares}
    return found


def headroom(recorder: Recorder, now: float) -> dict[str, Any]:
    """How much of the SLOs is left, 1 to 0 and below: for a prompt of the recent median length that came now,
    on each instance and on the best one, and by the 90th percentile of the requests of the last minute; null
    where nothing can be said."""
    scheduler, prompt = recorder.scheduler, typical(recorder.prompts)
    instances = scheduler.instances.values()
    each = predicted(instances, scheduler.predictor, scheduler.slo, prompt)
    return {
        "prompt_tokens": prompt,
        "predicted": asdict(best(instances, each)),
        "measured": asdict(recorder.attainment.headroom(now, MINUTE)),
        "instances": {name: asdict(one) for name, one in each.items()},
    }


def _policy(policy: Policy) -> dict[str, Any]:
    """Its values, without the classes: what is promised to those is said by itself."""
    return {name: value for name, value in asdict(replace(policy, classes=())).items() if name != "classes"}


def _classes(system: System) -> dict[str, Any]:
    """What is promised to each class of requests, and how many of those judged met both SLOs."""
    attained, slo = system.scheduler.counters.attained, system.scheduler.slo
    names = dict.fromkeys((*system.classes, *attained))
    rows = {}
    for name in names:
        one, kept = system.classes.get(name, SLOClass(name)), attained.get(name, Attained()).both
        promised = asdict(one.slo(slo) or slo)
        rows[name] = {"slo": promised, "judged": kept.met + kept.missed, "good": kept.met}
    return rows


def _autotune(system: System) -> dict[str, Any]:
    """What the tuner saw at its last look, what it proposed last, and what it changed or suggested lately."""
    tuner, adviser = system.tuner, system.adviser
    if tuner is None or adviser is None:
        return {"mode": OFF}
    return {
        "mode": ON if tuner.act else SUGGEST,
        "view": None if tuner.view is None else asdict(tuner.view),
        "pace": tuner.done.pace,
        "proposal": None if (found := tuner.proposal) is None else {**asdict(found), "gain": found.gain},
        "rehearsing_seconds": adviser.seconds,
        "changes": [asdict(change) for change in list(tuner.changes)[-SHOWN:]],
    }


def _elastic(system: System) -> dict[str, Any]:
    """Instances that are started beside those that serve, those that leave, and those that did not start. One
    that leaves is among the instances, too, until its process is ended."""
    elastic, now = system.elastic, time.monotonic()
    return {
        "starting": [
            {
                "name": one.name,
                "kind": one.kind.value,
                "standing": Standing.STARTING.value,
                "devices": elastic.devices.of(one.index),
                "seconds": now - one.began,
            }
            for one in elastic.coming.values()
        ],
        "leaving": [
            {"name": one.name, "seconds_left": max(0.0, one.until - now)} for one in elastic.leaving.values()
        ],
        "failed": [
            {"name": one.name, "kind": one.kind.value, "why": one.why, "seconds_ago": now - one.at}
            for one in elastic.failures
        ],
    }


def _prefixes(system: System) -> str:
    """What is done about prefix caches; less than was asked for where instances cannot tell, or KV cannot
    move."""
    if system.cluster.hasher is None:
        return BLIND
    return FETCH if system.scheduler.policy.fetch else KNOWN


def _kv_paths(engines: list[Engine]) -> dict[str, str]:
    """How KV gets from one instance to another: "i0 -> i1": "direct" (same host) or "nixl"."""
    paths = {}
    for source, reader in permutations(engines, 2):
        found = reader.process.reads(source.engine_id)
        paths[f"{source.name} -> {reader.name}"] = "direct" if found else "nixl"
    return paths


def _places(system: System) -> Counter[tuple[str, str]]:
    """Requests by instance and stage; and those whose KV is on its way from it or to it."""
    count: Counter[tuple[str, str]] = Counter()
    for journey in system.cluster.journeys.values():
        held = journey.held.seat if journey.held is not None else None
        if (seat := journey.seat or held) is not None:
            count[seat.name, journey.stage.value] += 1
        passage = journey.passage
        if passage is not None and passage.passing in UNDER_WAY:
            count[passage.source.name, "kv_leaving"] += 1
            count[passage.target.name, "kv_coming"] += 1
    return count


def _instance(system: System, engine: Engine, places: Counter[tuple[str, str]]) -> dict[str, Any]:
    ledger = system.scheduler.instances[engine.name]
    place, now = system.keeper.supervisor.places[engine.name], time.monotonic()
    return {
        "name": engine.name,
        "kind": ledger.kind.value,
        "chunk": ledger.chunk,
        "alive": engine.alive,
        "silent": engine in system.keeper.silent,
        "standing": place.standing.value,
        "restarts": place.restarts,
        "last_loss": None
        if place.lost_at is None
        else {"why": place.why, "seconds_ago": now - place.lost_at},
        "back_in": system.keeper.supervisor.returns(engine.name, now),
        "draining": ledger.draining,
        "leaving": engine.name in system.elastic.leaving,
        "devices": system.elastic.devices.of(engine.index),
        "stages": {stage.value: places[engine.name, stage.value] for stage in HERE},
        "kv_leaving": places[engine.name, "kv_leaving"],
        "kv_coming": places[engine.name, "kv_coming"],
        "running": engine.running,
        "waiting": engine.waiting,
        "decodes": ledger.decodes,
        "arriving": ledger.arriving,
        "queued_prefill_tokens": ledger.queued_prefill_tokens,
        "kv_tokens": engine.kv_tokens,
        "kv_capacity": engine.kv_capacity,
        "kv_usage": engine.kv_tokens / engine.kv_capacity,
        "cached_blocks": engine.cached_blocks,
        "host_blocks": engine.host_blocks,
        "steps": system.recorder.steps[engine.name],
        "prefill_tokens": system.recorder.prefill_tokens[engine.name],
        "output_tokens": system.recorder.output_tokens[engine.name],
        "late_kv": engine.recomputed_late,
        "pid": engine.process.pid,
        "log": str(engine.process.log),
    }
