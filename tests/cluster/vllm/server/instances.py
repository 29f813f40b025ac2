"""Instances without engines, for tests of what looks after them: clients that answer when told to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.wire import flight_file
from taichi_serve.sliders import Kind


class Client:
    """A client whose engine core answers nothing by itself."""

    vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=16),
        model_config=SimpleNamespace(max_model_len=1000, get_vocab_size=lambda: 500),
    )
    kv_capacity = 1000

    def __init__(self) -> None:
        self.asked: list[asyncio.Future[Any]] = []
        self.told: list[tuple[Any, ...]] = []
        self.closed = False

    async def call_utility_async(self, method: str) -> Any:
        assert method == "taichi_here"
        self.asked.append(asyncio.get_running_loop().create_future())
        return await self.asked[-1]

    def tell(self, method: str, *args: Any) -> None:
        self.told.append((method, *args))

    def fail(self) -> None:
        for answer in self.asked:
            if not answer.done():
                answer.set_exception(EngineDeadError())

    def close(self) -> None:
        self.closed = True


class Process:
    """A process of an instance; killed when it is told so."""

    pid = 4711
    direct = None
    host = ""
    torn = False
    found = False

    def __init__(self, directory: Path, name: str) -> None:
        self.name, self.directory = name, directory
        self.engine_id = f"server-{name}"
        self.log = directory / f"{name}.log"
        self.log.write_text("")
        self.killed = self.ended = False
        self.line = SimpleNamespace(contacts=SimpleNamespace(again=False))

    def kill(self) -> None:
        self.killed = True

    def end(self) -> bool:
        self.ended = True
        return True

    def stop(self, timeout: float) -> bool:
        self.ended = True
        return True

    def cause(self) -> str:
        return "it wrote nothing"

    def reads(self, source: str) -> bool:
        return False

    def end_of(self, what: str) -> str:
        return what

    def computes(self, *legs: str) -> None:
        """Its core began a step with these prompts."""
        half = "\0".join(legs).encode()
        data = bytearray(1 << 16)
        data[8:12] = len(half).to_bytes(4, "little")
        data[12 : 12 + len(half)] = half
        flight_file(self.directory, self.engine_id).write_bytes(data)


def _answered() -> asyncio.Future[None]:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    done.set_result(None)
    return done


def instance(directory: Path, index: int, turn: int = 1) -> Engine:
    """One with a client and a process of these kinds."""
    name = f"i{index}" if turn == 1 else f"i{index}.{turn}"
    copiers: Any = SimpleNamespace(close=lambda: None, ranks=1, ping=_answered)
    process: Any = Process(directory, name)
    client: Any = Client()
    return Engine(index, f"i{index}", process, client, copiers, Kind.D_HEAVY, 256)
