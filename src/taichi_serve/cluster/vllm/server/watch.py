"""Asks instances that say nothing whether they are there, and tells the keeper who is silent (pulse.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from vllm.v1.engine.exceptions import EngineDeadError

from taichi_serve.cluster.vllm.server.clock import Patience
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.pulse import Pulse, Verdict

LOOK = 0.5  # seconds between two looks


class Keeper(Protocol):
    """Who is told."""

    def silence(self, engine: Engine, seconds: float) -> None:
        """It does not answer."""
        ...

    def answered(self, engine: Engine) -> None:
        """It answers again."""
        ...

    def cut(self, engine: Engine) -> None:
        """A connection to it was lost and made anew."""
        ...

    def stalled(self, engine: Engine, seconds: float) -> None:
        """It has not answered for too long."""
        ...


class Watch:
    """Over those that `engines` gives: all that serve. `stall` is how long one may be silent, in seconds."""

    def __init__(
        self, engines: Callable[[], list[Engine]], patience: Patience, stall: float, keeper: Keeper
    ) -> None:
        self._engines = engines
        self._patience = patience
        self._stall = stall
        self._keeper = keeper
        self._pulses: dict[Engine, Pulse] = {}
        self._asking: set[asyncio.Task[None]] = set()

    def heard(self, engine: Engine) -> None:
        """An output of a step came."""
        pulse = self._pulses.get(engine)
        if pulse is not None and pulse.heard(self._patience.now, busy=True):
            self._keeper.answered(engine)

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(LOOK)
            self.look()

    def look(self) -> None:
        """Ask whoever is quiet, and tell of those who are silent, or were cut off."""
        now, resumed = self._patience.now, self._patience.resumed
        for engine in self._engines():
            if engine.alive and engine.cut:
                self._keeper.cut(engine)
        there = [engine for engine in self._engines() if engine.alive]
        self._pulses = {e: self._pulses.get(e) or Pulse(now, self._stall) for e in there}
        for engine, pulse in self._pulses.items():
            match pulse.look(now, resumed):
                case Verdict.ASK:
                    task = asyncio.ensure_future(self._ask(engine, pulse))
                    self._asking.add(task)
                    task.add_done_callback(self._asking.discard)
                case Verdict.SILENT:
                    self._keeper.silence(engine, now - pulse.heard_at)
                case Verdict.STALLED:
                    self._keeper.stalled(engine, now - pulse.heard_at)

    async def _ask(self, engine: Engine, pulse: Pulse) -> None:
        try:
            # The engine core between two steps, and the copier's thread of every worker. Not through the core
            # to the workers: vLLM's spin for a second after each message, and would take a core when idle.
            await engine.answers()
        except EngineDeadError:
            return
        except Exception:  # noqa: BLE001  vLLM raises Exception for a call that failed: no sign of life
            pulse.asked = False
            return
        if pulse.answered(self._patience.now):
            self._keeper.answered(engine)
