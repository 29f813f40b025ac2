"""A keeper of two instances, and whom it speaks to: a launcher and a cluster that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from instances import instance
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

from taichi_serve.cluster.vllm.server import devices
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.keeper import Keeper
from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.quarantine import Quarantine
from taichi_serve.cluster.vllm.server.supervisor import Supervisor
from taichi_serve.cluster.vllm.server.told import Told
from taichi_serve.messages import Command


@dataclass
class Launcher:
    """Starts instances at once, or fails as often as it is told to."""

    directory: Path
    failures: int = 0
    begun: list[str] = field(default_factory=list)
    made: list[Engine] = field(default_factory=list)
    loads: asyncio.Event | None = None  # where there is one, they are up when it is set

    def begin(self, index: int, kind: Any, turn: int) -> Any:
        engine = instance(self.directory, index, turn)
        self.begun.append(engine.process.name)
        self.made.append(engine)
        return engine.process

    async def ready(self, process: Any, index: int, kind: Any, chunk: int) -> Engine:
        if self.failures:
            self.failures -= 1
            raise StartError(f"instance {process.name} did not start (exit code 1): no memory")
        if self.loads is not None:
            await self.loads.wait()
        engine = next(engine for engine in self.made if engine.process is process)
        engine.kind, engine.chunk = kind, chunk
        return engine


class Cluster:
    """A cluster that keeps what it is told; its rehearsals succeed unless it is told otherwise."""

    def __init__(self, engines: list[Engine]) -> None:
        self.engines = engines
        self.told: list[tuple[Any, ...]] = []
        self.met: list[tuple[str, str]] = []
        self.fails: Callable[[Engine, Engine | None], bool] = lambda at, to: False
        self.hangs: Callable[[Engine, Engine | None], bool] = lambda at, to: False
        self.joined = asyncio.Event()

    def serves(self, engine: Engine) -> bool:
        return engine in self.engines

    def lose(self, engine: Engine, why: str) -> None:
        engine.alive = False
        self.told.append(("lose", engine.process.name, why))

    def join(self, engine: Engine) -> None:
        self.engines[engine.index] = engine
        self.told.append(("join", engine.process.name))
        self.joined.set()

    def silence(self, engine: Engine, on: bool) -> None:
        self.told.append(("silence", engine.process.name, on))

    def hopeless(self, why: str) -> None:
        self.told.append(("hopeless", why))

    def send(self, command: Command) -> None:
        self.told.append(("send", command))

    def rehearse(self, request: EngineCoreRequest, at: Any, to: Any) -> asyncio.Future[int]:
        self.met.append((at.process.name, (to or at).process.name))
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if not self.hangs(at, to):
            done.set_result(0 if self.fails(at, to) else 2)
        return done

    def abandon(self, request_id: str, cancelled: bool) -> None:
        self.told.append(("abandon", request_id))


class House:
    """A keeper of two instances, and whom it speaks to."""

    def __init__(self, directory: Path, restarts: int = 10) -> None:
        self.cluster = Cluster([instance(directory, 0), instance(directory, 1)])
        self.launcher = Launcher(directory)
        self.said: list[str] = []
        self.delivered: list[EngineCoreOutputs] = []
        self.failed: list[tuple[str, str]] = []
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        told = Told(
            self.said.append,
            self.delivered.append,
            lambda request, why: self.failed.append((request, why)),
            self.over.set_result,
        )
        launcher: Any = self.launcher
        self.keeper = Keeper(
            self.cluster, launcher, Supervisor(["i0", "i1"], restarts, 30.0), Quarantine(), told
        )
        self.keeper.open()

    async def joined(self) -> None:
        await asyncio.wait_for(self.cluster.joined.wait(), 10)
        await asyncio.sleep(0)

    def runs(self, index: int, leg: str, request: str, tokens: int = 0) -> None:
        """A request whose leg is there; with tokens it decodes."""
        engine = self.cluster.engines[index]
        journey: Any = SimpleNamespace(id=request, tokens=[1] * tokens, warm=None)
        engine.legs[leg] = journey
        if tokens:
            engine.residents[leg] = request


async def until(holds: Callable[[], bool]) -> None:
    """Let the others run until this is so."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110  nobody here sets an event
            await asyncio.sleep(0)


def on_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """So many GPUs are visible."""
    monkeypatch.setattr(devices.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(devices.current_platform, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
