"""Who was being computed by an instance, for quarantine.py."""

from __future__ import annotations

from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.wire import flight_file, read_flight

# Output tokens of a request that has only begun to decode: if that killed the instance, it was one of these.
YOUNG = 8


def computed(engine: Engine) -> tuple[list[str], list[str]]:
    """The requests that were decoding there; and those whose prompt was in the step, or that had hardly begun
    to decode."""
    prompts = computed_prompts(engine)
    decodes: list[str] = []
    for leg, request in engine.residents.items():
        journey = engine.legs.get(leg)
        young = journey is not None and len(journey.tokens) < YOUNG
        (prompts if young else decodes).append(request)
    return decodes, prompts


def computed_prompts(engine: Engine) -> list[str]:
    """The requests whose prompt was in the step that the engine core began last. Where it left no word, all
    that do not decode yet: any of them may be one."""
    path = flight_file(engine.process.directory, engine.process.engine_id)
    waiting = {leg: its.id for leg, its in engine.legs.items() if leg not in engine.residents}
    if not path.exists():
        return list(waiting.values())
    return [waiting[leg] for leg in read_flight(path) if leg in waiting]
