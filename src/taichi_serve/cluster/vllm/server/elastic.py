"""Instances that are added to a server that serves, and that leave it again.

One that is added has its name at once, and takes part when it is up and has met all others. One that leaves
is drained first; what is still on it when its time is over goes on elsewhere, as after a loss. Names are
never given twice. Whatever goes wrong here is told, and disturbs nobody who serves.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Protocol

from taichi_serve.cluster.vllm.server.devices import Devices, NoDeviceError
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.keeper import Keeper
from taichi_serve.cluster.vllm.server.process import reason
from taichi_serve.cluster.vllm.server.start import stop
from taichi_serve.cluster.vllm.server.supervisor import Standing
from taichi_serve.cluster.vllm.server.warm import Rehearsing, measure
from taichi_serve.instance import Instance
from taichi_serve.messages import Drained, Event
from taichi_serve.scheduling.elastic import kind_of
from taichi_serve.scheduling.ledger import Ledger
from taichi_serve.sliders import Kind, Sliders

WITHIN = 600.0  # seconds that who leaves is waited for, where nobody says how many
LOOK = 0.1  # seconds between two looks whether it is empty
KEPT = 10  # failed starts that are told


class RefusedError(ValueError):
    """It cannot be done now. The message says why."""


class UnknownError(KeyError):
    """There is no instance of this name, and never was one."""


class Change(Enum):
    """What became of an instance."""

    ADDED = "added"
    REMOVED = "removed"
    FAILED = "failed"  # it was to be added, and did not start


class Cluster(Rehearsing, Protocol):
    """What is needed of the cluster: its membership (membership.py), and rehearsals."""

    engines: list[Engine]

    def add(self, engine: Engine, chunk: int | None) -> None:
        """A new one takes part."""
        ...

    def remove(self, name: str) -> Engine:
        """One leaves for good."""
        ...

    def busy(self, engine: Engine) -> bool:
        """Whether a request is there, or KV is read from it."""
        ...

    def tell(self, event: Event) -> None:
        """A fact, for the scheduler."""
        ...


class Scheduler(Protocol):
    """What is needed of the scheduler: its books, to look at."""

    sliders: Sliders
    ledger: Ledger


@dataclass(slots=True, eq=False)
class Coming:
    """An instance that is being started. `chunk` is what was asked for."""

    name: str
    index: int
    kind: Kind
    chunk: int | None
    began: float
    task: asyncio.Task[None] | None = None
    dropped: bool = False  # nobody wants it any more, and it is being ended


@dataclass(slots=True, eq=False)
class Leaving:
    """An instance that is being drained, until `until` at most (time.monotonic() seconds)."""

    name: str
    until: float


@dataclass(frozen=True, slots=True)
class Failure:
    """One that did not start."""

    name: str
    kind: Kind
    why: str
    at: float


@dataclass(slots=True)
class Elastic:
    """Adds and removes the instances of one server. `entered` and `departed` are told the numbers of those
    that take part, and no longer do; they may not raise."""

    cluster: Cluster
    keeper: Keeper
    devices: Devices
    scheduler: Scheduler
    entered: Callable[[int], None] = lambda index: None
    departed: Callable[[int], None] = lambda index: None
    coming: dict[str, Coming] = field(default_factory=dict)
    leaving: dict[str, Leaving] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)  # names of those that left, or never came
    failures: deque[Failure] = field(default_factory=lambda: deque(maxlen=KEPT))
    counts: dict[Change, int] = field(default_factory=lambda: dict.fromkeys(Change, 0))
    _next: int = 0

    def __post_init__(self) -> None:
        self._next = len(self.cluster.engines)

    # ------------------------------------------------------------------------------------------- adding

    def add(self, kind: Kind, devices: str | None = None, chunk: int | None = None) -> str:
        """Start one more instance; its name. Raises RefusedError where no device is free, and ValueError
        where `devices` or `chunk` is not what they can be."""
        sliders = self.scheduler.sliders.more(kind, chunk)
        index = self._next
        try:
            self.devices.take(index, devices)
        except NoDeviceError as none:
            raise RefusedError(str(none)) from none
        self._next += 1
        one = Coming(f"i{index}", index, kind, chunk, time.monotonic())
        self.coming[one.name] = one
        one.task = self.keeper.begin(self._come(one, sliders.chunk(kind)))
        # Not in the task: one that is cancelled before its first step never runs.
        one.task.add_done_callback(lambda task: self._dropped(one))
        self.keeper.told.say(f"instance {one.name} is started, {kind.value}, on {self._where(index)}")
        return one.name

    def _where(self, index: int) -> str:
        return f"devices {self.devices.of(index)}" if self.devices.of(index) else "any core"

    async def _come(self, one: Coming, chunk: int) -> None:
        try:
            engine = await self.keeper.bring(one.index, one.kind, chunk, partial(self._enter, one))
        except Exception as wrong:  # noqa: BLE001  whatever it is, the others serve on
            self._failed(one, reason(wrong))
            return
        self.keeper.told.say(f"instance {one.name} serves after {time.monotonic() - one.began:.0f} s")
        await measure(self.cluster, [engine])

    def _enter(self, one: Coming, engine: Engine) -> None:
        """Let it in, or leave all as it was."""
        self.keeper.supervisor.add(one.name)
        try:
            self.cluster.add(engine, one.chunk)
        except BaseException:
            self.keeper.supervisor.remove(one.name)
            raise
        del self.coming[one.name]
        self.counts[Change.ADDED] += 1
        self.entered(one.index)

    def _failed(self, one: Coming, why: str) -> None:
        self._dropped(one, failed=True)
        self.failures.append(Failure(one.name, one.kind, why, time.monotonic()))
        self.counts[Change.FAILED] += 1
        self.keeper.told.say(f"INSTANCE {one.name} COULD NOT BE ADDED: {why}")

    def _dropped(self, one: Coming, failed: bool = False) -> None:
        """Its processes are gone."""
        if self.coming.pop(one.name, None) is not None:
            self.devices.give_back(one.index, failed)
            self.gone.add(one.name)

    # ------------------------------------------------------------------------------------------ leaving

    def remove(self, name: str, within: float = WITHIN) -> bool:
        """Have an instance leave, in so many seconds at most, or sooner than it was told before; whether it
        is gone. Raises RefusedError where it is needed, and UnknownError."""
        if name in self.gone:
            return True
        until = time.monotonic() + within
        if (one := self.coming.get(name)) is not None:
            assert one.task is not None
            if not one.dropped:  # a second word must not cancel what the first one began
                one.dropped = one.task.cancel()
            return False
        if (before := self.leaving.get(name)) is not None:
            before.until = min(before.until, until)
            return False
        if self._engine(name) is None:
            raise UnknownError(name)
        self._check(name)
        self.leaving[name] = Leaving(name, until)
        self.keeper.leaves(name)
        self.keeper.told.say(f"instance {name} leaves, within {within:g} s")
        self.cluster.tell(Drained(time.monotonic(), name))
        self.keeper.begin(self._leave(self.leaving[name]))
        return False

    def _check(self, name: str) -> None:
        """Raises RefusedError where others could not do its work."""
        if not any(one.serving for one in self._staying(name)):
            raise RefusedError(f"instance {name} is the last one that serves")
        ledger, sliders = self.scheduler.ledger, self.scheduler.sliders
        left = sliders
        for gone in (*self.leaving, name):
            if gone in ledger.instances:
                try:
                    left = left.less(kind_of(ledger, sliders, gone))
                except ValueError as wrong:
                    raise RefusedError(f"without instance {name}: {wrong}") from None

    def _staying(self, but: str) -> list[Instance]:
        instances = self.scheduler.ledger.instances.values()
        return [one for one in instances if one.name != but and one.name not in self.leaving]

    async def _leave(self, one: Leaving) -> None:
        while time.monotonic() < one.until:  # which may be brought forward
            if self._empty(one.name):
                break
            await asyncio.sleep(LOOK)
        if not self._others_stay(one.name):
            self._keep(one)
            return
        rest = self._rest(one.name)
        self._give_up_on_silent(one.name)
        engine = self.cluster.remove(one.name)
        self.keeper.left(engine)
        self.departed(engine.index)
        gone = False
        try:
            gone = await stop(engine)
            await self.keeper.settled(one.name)
        finally:
            del self.leaving[one.name]
            self.devices.give_back(engine.index, failed=not gone)  # others are tried before these
            self.gone.add(one.name)
            self.counts[Change.REMOVED] += 1
        left = f"; {rest} requests were still on it, and went on elsewhere where they could" if rest else ""
        self.keeper.told.say(f"instance {one.name} left{left}")

    def _give_up_on_silent(self, name: str) -> None:
        """Requests may wait until an instance that hangs under them answers or is lost: now it is lost."""
        engine = self._engine(name)
        if engine is not None and engine in self.keeper.silent:
            self.keeper.lost(engine, "it did not answer when its time to leave was over")

    def _empty(self, name: str) -> bool:
        """Whether nothing is on it or on its way to it, and nothing will be sent there."""
        engine, here = self._engine(name), self.scheduler.ledger.instances.get(name)
        if engine is None or here is None or not engine.alive:
            return True
        booked = here.decodes or here.queued_requests or here.arriving or here.leaving_tokens
        return here.draining and not booked and not self.cluster.busy(engine)

    def _others_stay(self, name: str) -> bool:
        """Whether somebody serves, or is expected back."""
        places = self.keeper.supervisor.places
        staying = [places[one.name] for one in self._staying(name) if one.name in places]
        return any(place.standing is not Standing.OUT for place in staying)

    def _keep(self, one: Leaving) -> None:
        """Nobody else is left by now."""
        del self.leaving[one.name]
        if (engine := self._engine(one.name)) is not None:
            self.keeper.stays(engine)
        self.keeper.told.say(f"instance {one.name} stays: no other one is left")
        self.cluster.tell(Drained(time.monotonic(), one.name, on=False))

    def _rest(self, name: str) -> int:
        requests = self.scheduler.ledger.requests.values()
        return sum(name in (request.instance, request.target) for request in requests)

    def _engine(self, name: str) -> Engine | None:
        return next((engine for engine in self.cluster.engines if engine.name == name), None)

    def names(self) -> Collection[str]:
        """All that are there or coming, in order of their numbers."""
        return [*(engine.name for engine in self.cluster.engines), *self.coming]
