"""The port between the scheduler and whatever runs the requests: facts come out, decisions go in.

One loop drives the real cluster and the simulated one. `Recorded` ships with it: a cluster that plays back
facts and keeps what it was told.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Protocol

from taichi_serve.messages import Command, Event


class Cluster(Protocol):
    """Instances that produce facts and obey decisions."""

    def events(self) -> AsyncIterator[Event]:
        """Facts in the order they became known, until the cluster closes."""
        ...

    def send(self, command: Command) -> None:
        """Take a decision; never blocks and never raises: what cannot be done comes back as a fact."""
        ...


class Scheduler(Protocol):
    """Whatever turns one fact into decisions: GlobalScheduler, or a log around it."""

    def on(self, event: Event) -> Sequence[Command]:
        """The decisions that follow from this fact, in the order they are to be carried out."""
        ...


async def drive(scheduler: Scheduler, cluster: Cluster) -> None:
    """Feed every fact to the scheduler and every decision to the cluster until the facts end."""
    async for event in cluster.events():
        for command in scheduler.on(event):
            cluster.send(command)


class Facts(Protocol):
    """A cluster whose facts can be had without waiting: the simulated one."""

    def facts(self) -> Iterator[Event]:
        """Facts in the order they became known."""
        ...

    def send(self, command: Command) -> None:
        """Take a decision."""
        ...


def run(scheduler: Scheduler, cluster: Facts) -> None:
    """drive() for a cluster on a virtual clock: the same loop, without an event loop around every fact."""
    for event in cluster.facts():
        for command in scheduler.on(event):
            cluster.send(command)


async def told(facts: Iterable[Event]) -> AsyncIterator[Event]:
    """Facts that need no waiting, as events() gives them."""
    for event in facts:
        yield event


class Recorded:
    """A cluster that plays back `history` and keeps the commands it gets in `sent`."""

    def __init__(self, history: Iterable[Event]) -> None:
        self.history = list(history)
        self.sent: list[Command] = []

    def events(self) -> AsyncIterator[Event]:
        """The recorded facts, one by one."""
        return told(self.history)

    def send(self, command: Command) -> None:
        """Keep the command."""
        self.sent.append(command)
