"""The state of the whole system as one JSON object."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from itertools import permutations
from typing import TYPE_CHECKING, Any

from taichi_serve.cluster.vllm.wire import direct
from taichi_serve.messages import Move, Outcome

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.server.engine import Engine
    from taichi_serve.frontend.server import System


def state(system: System) -> dict[str, Any]:
    """Sliders, SLO, instances and counters. Counters start with the server."""
    recorder = system.recorder
    return {
        "sliders": asdict(system.scheduler.sliders),
        "slo": asdict(system.scheduler.slo),
        "policy": asdict(system.scheduler.policy),
        "instances": [_instance(system, engine) for engine in system.cluster.engines],
        "requests": {
            "accepted": recorder.accepted,
            "live": recorder.accepted - recorder.outcomes.total(),
            **{outcome.value: recorder.outcomes[outcome] for outcome in Outcome},
        },
        "moves": {
            **{move.value: recorder.moves[move] for move in Move},
            "bytes": recorder.moved_bytes,
            "recomputes": recorder.recomputes,
            "median_gap": statistics.median(recorder.gaps) if recorder.gaps else None,
        },
        "bound": dict(recorder.bound),
        "kv_paths": _kv_paths(system.cluster.engines),
    }


def _kv_paths(engines: list[Engine]) -> dict[str, str]:
    """How KV gets from one instance to another: "i0 -> i1": "direct" (same host) or "nixl"."""
    paths = {}
    for source, reader in permutations(engines, 2):
        ids = reader.process.engine_id, source.process.engine_id
        found = direct(reader.process.log.parent, *ids)
        paths[f"{source.name} -> {reader.name}"] = "direct" if found else "nixl"
    return paths


def _instance(system: System, engine: Engine) -> dict[str, Any]:
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
        "running": engine.running,
        "waiting": engine.waiting,
        "decodes": ledger.decodes,
        "arriving": ledger.arriving,
        "queued_prefill_tokens": ledger.queued_prefill_tokens,
        "kv_tokens": engine.kv_tokens,
        "kv_capacity": engine.kv_capacity,
        "kv_usage": engine.kv_tokens / engine.kv_capacity,
        "steps": system.recorder.steps[engine.name],
        "prefill_tokens": system.recorder.prefill_tokens[engine.name],
        "late_kv": engine.recomputed_late,
        "pid": engine.process.pid,
        "log": str(engine.process.log),
    }
