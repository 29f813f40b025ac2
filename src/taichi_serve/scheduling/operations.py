"""What is not the algorithms' own idea: an operator's hand."""

from __future__ import annotations

from taichi_serve.instance import Instance
from taichi_serve.messages import Asked, Command, Drained, Move, SetChunk
from taichi_serve.request import State
from taichi_serve.scheduling.dispatch import Dispatcher
from taichi_serve.scheduling.ledger import Ledger
from taichi_serve.sliders import Sliders


def ask(dispatcher: Dispatcher, event: Asked) -> list[Command]:
    """Move one running request where the operator wants it, room or not: the cluster may still refuse."""
    ledger = dispatcher.ledger
    request, target = ledger.requests.get(event.request), ledger.instances.get(event.to)
    if request is None or target is None or request.state is not State.DECODING:
        return []
    source = ledger.home(request)
    if not (request.movable and source.answers and target.answers) or source is target:
        return []
    return [dispatcher.flow(request, target, Move.OPERATOR, event.at, "an operator asked", [target])]


def drain(dispatcher: Dispatcher, event: Drained) -> list[Command]:
    """Take an instance out of service, or back into it."""
    instance = dispatcher.ledger.instances.get(event.instance)
    if instance is None:
        return []
    dispatcher.ledger.touch(instance)
    instance.draining = event.on
    return empty(dispatcher, instance, event.at) if event.on and instance.answers else []


def empty(dispatcher: Dispatcher, source: Instance, now: float) -> list[Command]:
    """Send away whoever can move and finds room, like to like first; the others try again in a later step."""
    ledger, policy = dispatcher.ledger, dispatcher.policy
    find = dispatcher.fleet.find
    elsewhere = [i for i in ledger.instances.values() if i.serving]
    alike = dispatcher.of_kind(source.kind)
    commands: list[Command] = []
    if not elsewhere:
        return commands
    for name in ledger.residents[source.name].everyone(now, source.ticks):
        request = ledger.requests[name]
        kv_tokens = request.prompt_tokens + request.output_tokens(source.ticks)
        prefixes = dispatcher.fleet.prefixes(request)
        target = find(alike, kv_tokens, 1.0, policy, prefixes) or find(
            elsewhere, kv_tokens, 1.0, policy, prefixes
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
        dispatcher.ledger.touch(instance)
    return commands


def close(ledger: Ledger, instance: Instance) -> list[Command]:
    """Set the chunk that a slider asked for to 0 once the last queued prompt is through."""
    if not instance.closing or instance.queued_requests:
        return []
    ledger.touch(instance)
    instance.closing, instance.chunk = False, 0
    return [SetChunk(instance.name, instance.kind, 0)] if instance.alive else []
