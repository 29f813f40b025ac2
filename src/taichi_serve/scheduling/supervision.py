"""What follows when an instance falls silent, is lost, or comes back."""

from __future__ import annotations

from taichi_serve.messages import Command, Hopeless, Joined, Lost, SetChunk, Silent
from taichi_serve.request import State
from taichi_serve.scheduling.dispatch import Dispatcher
from taichi_serve.scheduling.operations import close, slide
from taichi_serve.sliders import Sliders


def silence(dispatcher: Dispatcher, event: Silent, sliders: Sliders) -> list[Command]:
    """Who does not answer gets nothing new, and its queued prompts go elsewhere; its decodes stay."""
    ledger = dispatcher.ledger
    instance = ledger.instances.get(event.instance)
    if instance is None or not instance.alive:
        return []
    ledger.touch(instance)
    instance.silent = event.on
    back = [] if event.on else arrange(dispatcher, sliders)
    return [*back, *relieve(dispatcher, event.at, sliders)]


def lose(dispatcher: Dispatcher, event: Lost, sliders: Sliders) -> list[Command]:
    """Find another place for everybody on a lost instance or on the way to it, in order of arrival. With no
    instance left they wait for one to come back."""
    ledger = dispatcher.ledger
    instance = ledger.instances.get(event.instance)
    if instance is None or not instance.alive:
        return []
    ledger.touch(instance)
    instance.alive = False
    ledger.residency.lose(instance.name)
    commands: list[Command] = []
    for request in list(ledger.requests.values()):
        if request.instance == instance.name:
            on_its_way = request.state is State.MOVING and request.target != instance.name
            ledger.strand(request)
            if not on_its_way:  # else the cluster goes on with the tokens so far, at the target
                commands += dispatcher.place(request, event.at, sliders)
        elif request.target == instance.name:
            commands += dispatcher.place(request, event.at, sliders)
    instance.kv_tokens = 0
    ledger.touch(instance)
    return commands


def join(dispatcher: Dispatcher, event: Joined, sliders: Sliders) -> list[Command]:
    """Take a lost instance back with the kind and chunk of its position, and give it those who waited."""
    ledger = dispatcher.ledger
    instance = ledger.instances.get(event.instance)
    if instance is None or instance.alive:
        return []
    ledger.revive(instance, event.kv_capacity)
    instance.kind = dict(zip(ledger.instances, sliders.kinds(), strict=True))[instance.name]
    instance.chunk = sliders.chunk(instance.kind)
    ledger.touch(instance)
    commands: list[Command] = [SetChunk(instance.name, instance.kind, instance.chunk)]
    commands += arrange(dispatcher, sliders)
    for request in ledger.waiting():
        commands += dispatcher.place(request, event.at, sliders)
    return [*commands, *relieve(dispatcher, event.at, sliders)]


def despair(dispatcher: Dispatcher, event: Hopeless) -> list[Command]:
    """Give up everybody who waits for an instance."""
    return [dispatcher.fail(request, event.at, event.why) for request in dispatcher.ledger.waiting()]


def arrange(dispatcher: Dispatcher, sliders: Sliders) -> list[Command]:
    """Who became P-heavy in place of others goes back to what the sliders say, once somebody who answers
    takes prompts by them."""
    instances = dispatcher.ledger.instances.values()
    if any(i.answers and sliders.chunk(kind) for i, kind in zip(instances, sliders.kinds(), strict=True)):
        return slide(dispatcher, sliders)
    return []


def relieve(dispatcher: Dispatcher, now: float, sliders: Sliders) -> list[Command]:
    """Place the prompts of silent instances anew, if anybody answers: they have no token yet to lose."""
    ledger = dispatcher.ledger
    commands: list[Command] = []
    if not any(i.answers for i in ledger.instances.values()):
        return commands
    for instance in ledger.instances.values():
        if instance.alive and instance.silent:
            for name in list(ledger.queues[instance.name]):
                ledger.take_back(ledger.requests[name])
                commands += dispatcher.prefill(ledger.requests[name], now, sliders)
            commands += close(ledger, instance)
    return commands
