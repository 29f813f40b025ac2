"""What follows when an instance is added, or leaves for good.

The kinds of the sliders are given out in the order of the ledger's instances, P-heavy ones first. So one that
is added P-heavy comes after the last of these, and a D-heavy one at the end: nobody else changes its kind.
"""

from __future__ import annotations

from typing import Protocol

from taichi_serve.instance import Instance
from taichi_serve.latency.accuracy import Accuracy
from taichi_serve.messages import Added, Command, Lost, Placed, Removed, SetChunk
from taichi_serve.scheduling.dispatch import Dispatcher
from taichi_serve.scheduling.ledger import Ledger
from taichi_serve.scheduling.operations import slide
from taichi_serve.scheduling.queue import Queue
from taichi_serve.scheduling.supervision import lose, relieve
from taichi_serve.sliders import Kind, Sliders

GONE = "it left"


class Books(Protocol):
    """What of the scheduler changes with its instances."""

    sliders: Sliders
    ledger: Ledger
    accuracy: dict[str, Accuracy]


def add(books: Books, dispatcher: Dispatcher, event: Added) -> list[Command]:
    """Take a new instance in, and give it those who waited for one. A name that is known, and a chunk that
    does not fit the sliders (they moved meanwhile), change nothing else than that."""
    ledger = books.ledger
    if event.instance in ledger.instances:
        return []
    try:
        sliders = books.sliders.more(event.kind, event.chunk)
    except ValueError:
        sliders = books.sliders.more(event.kind)
    seats = next(iter(ledger.instances.values())).seats  # one command line is for all
    here = Instance(event.instance, event.kind, sliders.chunk(event.kind), event.kv_capacity, seats)
    _enter(ledger, here, books.sliders.p_heavy if event.kind is Kind.P_HEAVY else len(ledger.instances))
    books.sliders, books.accuracy[here.name] = sliders, Accuracy()
    commands: list[Command] = [SetChunk(here.name, here.kind, here.chunk), *slide(dispatcher, sliders)]
    for request in ledger.waiting():
        commands += dispatcher.place(request, event.at, sliders)
    return [*commands, *relieve(dispatcher, event.at, sliders)]


def placed(ledger: Ledger, event: Placed) -> list[Command]:
    """An instance runs on this host."""
    if (here := ledger.instances.get(event.instance)) is not None:
        here.host = event.host
    return []


def remove(books: Books, dispatcher: Dispatcher, event: Removed) -> list[Command]:
    """Forget an instance, once whoever is still on it has another place. The last one stays, as lost."""
    ledger = books.ledger
    if event.instance not in ledger.instances:
        return []
    commands = lose(dispatcher, Lost(event.at, event.instance, GONE), books.sliders)
    sliders = without(books.sliders, kind_of(ledger, books.sliders, event.instance))
    if sliders is None:
        return commands
    ledger.touched.discard(ledger.instances.pop(event.instance))
    ledger.residency.remove(event.instance)
    del ledger.queues[event.instance], ledger.residents[event.instance], books.accuracy[event.instance]
    ledger.changes += 1
    books.sliders = sliders
    return [*commands, *slide(dispatcher, sliders)]


def kind_of(ledger: Ledger, sliders: Sliders, name: str) -> Kind:
    """The kind that the sliders give to this instance, whatever it is while others are lost."""
    return dict(zip(ledger.instances, sliders.kinds(), strict=True))[name]


def without(sliders: Sliders, kind: Kind) -> Sliders | None:
    """The sliders with one less of this kind. Where then nobody could prefill, one of those who are left
    becomes P-heavy; None where nobody is left."""
    try:
        return sliders.less(kind)
    except ValueError:
        left = sliders.instances - 1
        return Sliders(1, left - 1, max(sliders.p_chunk, sliders.d_chunk), sliders.d_chunk) if left else None


def _enter(ledger: Ledger, here: Instance, place: int) -> None:
    """Book a new instance at this place of their order."""
    if here.kv_capacity < 1:
        raise ValueError(f"{here.name} came with a KV capacity of {here.kv_capacity} tokens")
    ledger.residency.add(here.name)
    ledger.queues[here.name], ledger.residents[here.name] = Queue(), ledger.fresh()
    after = list(ledger.instances.values())[place:]
    ledger.instances[here.name] = here
    for one in after:  # a dictionary has the order in which it was filled
        ledger.instances[one.name] = ledger.instances.pop(one.name)
    ledger.touch(here)
    ledger.changes += 1
