"""What is not the algorithms' own idea: an operator's hand, and the loss of an instance."""

from __future__ import annotations

from taichi_serve.instance import Instance
from taichi_serve.messages import Asked, Command, Drained, Lost, Move, SetChunk
from taichi_serve.request import State
from taichi_serve.scheduling.decode import choose_target
from taichi_serve.scheduling.dispatch import Dispatcher
from taichi_serve.sliders import Sliders


def ask(dispatcher: Dispatcher, event: Asked) -> list[Command]:
    """Move one running request where the operator wants it, room or not: the cluster may still refuse."""
    ledger = dispatcher.ledger
    request, target = ledger.requests.get(event.request), ledger.instances.get(event.to)
    if request is None or target is None or request.state is not State.DECODING:
        return []
    if not (request.movable and target.alive) or request.instance == target.name:
        return []
    return [dispatcher.flow(request, target, Move.OPERATOR, event.at, "an operator asked", [target])]


def drain(dispatcher: Dispatcher, event: Drained) -> list[Command]:
    """Take an instance out of service, or back into it."""
    instance = dispatcher.ledger.instances.get(event.instance)
    if instance is None:
        return []
    instance.draining = event.on
    return empty(dispatcher, instance, event.at) if event.on and instance.alive else []


def empty(dispatcher: Dispatcher, source: Instance, now: float) -> list[Command]:
    """Send away whoever can move and finds room, like to like first; the others try again in a later step."""
    ledger, policy = dispatcher.ledger, dispatcher.policy
    elsewhere = [i for i in ledger.instances.values() if i.serving]
    alike = [i for i in elsewhere if i.kind is source.kind]
    commands: list[Command] = []
    if not elsewhere:
        return commands
    for name in ledger.residents[source.name].everyone():
        request = ledger.requests[name]
        kv_tokens = request.prompt_tokens + request.output_tokens(source.ticks)
        target = choose_target(alike, kv_tokens, 1.0, policy) or choose_target(
            elsewhere, kv_tokens, 1.0, policy
        )
        if target is None:
            break
        why = f"{source.name} is draining"
        commands.append(dispatcher.flow(request, target, Move.DRAIN, now, why, elsewhere))
    return commands


def slide(dispatcher: Dispatcher, sliders: Sliders) -> list[Command]:
    """Give every instance the kind and chunk of these sliders; their number must be that of the instances."""
    commands: list[Command] = []
    for instance, kind in zip(dispatcher.ledger.instances.values(), sliders.kinds(), strict=True):
        chunk = sliders.chunk(kind)
        # Chunk 0 would starve the prompts that are queued here: it waits until they are through.
        instance.closing = chunk == 0 and instance.queued_requests > 0
        chunk = instance.chunk if instance.closing else chunk
        if instance.alive and (instance.kind, instance.chunk) != (kind, chunk):
            commands.append(SetChunk(instance.name, kind, chunk))
        instance.kind, instance.chunk = kind, chunk
    return commands


def close(instance: Instance) -> list[Command]:
    """Set the chunk that a slider asked for to 0 once the last queued prompt is through."""
    if not instance.closing or instance.queued_requests:
        return []
    instance.closing, instance.chunk = False, 0
    return [SetChunk(instance.name, instance.kind, 0)] if instance.alive else []


def lose(dispatcher: Dispatcher, event: Lost, p_chunk: int) -> list[Command]:
    """Find another place for everybody on a lost instance or on the way to it, in order of arrival."""
    ledger = dispatcher.ledger
    instance = ledger.instances.get(event.instance)
    if instance is None or not instance.alive:
        return []
    instance.alive = False
    commands: list[Command] = []
    for request in list(ledger.requests.values()):
        if request.instance == instance.name:
            prefilling = request.state is State.PREFILLING
            on_its_way = request.state is State.MOVING and request.target != instance.name
            ledger.strand(request)
            if prefilling:
                request.leg += 1
                commands += dispatcher.prefill(request, event.at, p_chunk)
            elif not on_its_way:  # else the cluster goes on with the tokens so far, at the target
                commands.append(dispatcher.rescue(request, event.at))
        elif request.target == instance.name:
            commands.append(dispatcher.rescue(request, event.at))
    instance.kv_tokens = 0
    return commands
