"""Which incarnation each instance is, and what follows as they are lost, come back, are added and leave."""

from __future__ import annotations

import time
from collections.abc import Callable

from taichi_serve.cluster.vllm.server.blocks import Hasher
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.hands import Hands
from taichi_serve.cluster.vllm.server.start import vanish
from taichi_serve.cluster.vllm.wire import Gone
from taichi_serve.messages import Added, Event, Hopeless, Joined, Lost, Outcome, Placed, Removed, Silent
from taichi_serve.stage import Stage

Tell = Callable[[Event], None]


class Membership:
    """The instances of a cluster. An instance is called by its name, and no name is ever given twice."""

    hasher: Hasher | None = None  # None: nobody knows what is cached
    hands: Hands

    def __init__(self, engines: list[Engine]) -> None:
        self.engines = engines  # the latest incarnation of each, lost ones too
        self._known = {engine.name: engine for engine in engines}  # as the scheduler knows them by now
        self._joined = dict(self._known)  # as they will be once the scheduler has heard of it

    def tell(self, event: Event) -> None:
        """A fact, for the scheduler."""
        raise NotImplementedError

    def _learned(self, event: Event) -> None:
        """The scheduler is about to hear this: what was decided before it was decided about those before."""
        if isinstance(event, Joined | Added) and event.instance in self._joined:
            self._known[event.instance] = self._joined[event.instance]
        elif isinstance(event, Removed):
            self._known.pop(event.instance, None)

    def locate(self, engine: Engine) -> None:
        """Say where it runs, if that may be elsewhere than the others do."""
        if engine.process.host:
            self.tell(Placed(time.monotonic(), engine.name, engine.process.host))

    def serves(self, engine: Engine) -> bool:
        """Whether this incarnation is, or was until it was lost, the one that work goes to."""
        return self._joined.get(engine.name) is engine

    def lose(self, engine: Engine, why: str) -> None:
        """An instance is gone: its legs wait for new decisions, moves away from it go on without KV."""
        if not engine.alive:
            return
        if self.serves(engine):
            self.tell(Lost(time.monotonic(), engine.name, why))
        self._forget(engine)

    def _forget(self, engine: Engine) -> None:
        engine.alive = False
        for other in self.engines:
            if other.alive:
                other.copiers.send(Gone(engine.engine_id))
        engine.legs.clear()
        engine.residents.clear()
        journeys = self.hands.journeys.values()
        warm = [journey for journey in journeys if journey.warm and journey.meets(engine)]
        self.hands.lost(engine)
        for journey in warm:
            if journey.stage is not Stage.OVER:
                self.hands.take(journey, journey.end, Outcome.FAILED)

    def join(self, engine: Engine) -> None:
        """A new incarnation, warm and empty, takes the place of one that was lost."""
        place = next(n for n, one in enumerate(self.engines) if one.name == engine.name)
        joined = Joined(time.monotonic(), engine.name, engine.kv_capacity)
        engine.follow(self.hasher)  # what it cached while it was warmed has been told to nobody
        # Nothing fails from here on: an instance is in, or it is not.
        self.engines[place] = self._joined[engine.name] = engine
        self.tell(joined)
        self.locate(engine)

    def add(self, engine: Engine, chunk: int | None) -> None:
        """A new instance, warm and empty, of a name that nobody had. `chunk`: see Added."""
        added = Added(time.monotonic(), engine.name, engine.kind, engine.kv_capacity, chunk)
        engine.follow(self.hasher)
        # Nothing fails from here on: an instance is in, or it is not.
        self.engines.append(engine)
        self._joined[engine.name] = engine
        self.tell(added)
        self.locate(engine)

    def remove(self, name: str) -> Engine:
        """An instance leaves for good, alive or lost; the one that it was last, whose process is the caller's
        to end. What it still has goes on elsewhere, as after a loss."""
        engine = self._joined.pop(name)
        self.engines.remove(engine)
        self.tell(Removed(time.monotonic(), name))
        if engine.alive:
            self._forget(engine)
        vanish(engine)
        return engine

    def busy(self, engine: Engine) -> bool:
        """Whether a request is on it or on its way to it, or KV is still read from it."""
        return any(journey.meets(engine) for journey in self.hands.journeys.values()) or any(
            engine in (passage.source, passage.target) for passage in self.hands.passages.values()
        )

    def silence(self, engine: Engine, on: bool) -> None:
        """An instance does not answer, or answers again."""
        if engine.alive and self.serves(engine):
            self.tell(Silent(time.monotonic(), engine.name, on))
            self.hands.silent(engine, on)

    def hopeless(self, why: str) -> None:
        """No instance is left, and none will come back."""
        self.tell(Hopeless(time.monotonic(), why))
