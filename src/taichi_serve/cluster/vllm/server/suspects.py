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
    for leg in engine.residents:
        journey = engine.legs.get(leg)
        if journey is not None and journey.warm is None:
            (prompts if len(journey.tokens) < YOUNG else decodes).append(journey.id)
    return decodes, prompts


def computed_prompts(engine: Engine) -> list[str]:
    """The requests whose prompt was in the step that the engine core began last. Where it left no word, all
    that do not decode yet: any of them may be one."""
    path = flight_file(engine.process.directory, engine.process.engine_id)
    waiting = {
        leg: journey.id
        for leg, journey in engine.legs.items()
        if leg not in engine.residents and journey.warm is None
    }
    if not path.exists():
        return list(waiting.values())
    return [waiting[leg] for leg in read_flight(path) if leg in waiting]
