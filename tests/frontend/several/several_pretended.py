"""A cluster, and what keeps it, as far as the scheduler's side of several front ends looks at them."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

from taichi_serve.classes import Terms
from taichi_serve.frontend.attendance import Attendance
from taichi_serve.frontend.several.hub import FrontEnds
from taichi_serve.frontend.several.line import Line
from taichi_serve.frontend.several.remote import RemoteClient, RemoteCluster
from taichi_serve.frontend.several.words import CACHE, Welcome
from taichi_serve.frontend.trouble import Trouble
from taichi_serve.slo import SLO

PROMISED = SLO(4.0, 0.07)


class Core:
    """A client of an engine core that answers what it is asked."""

    vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(**dict.fromkeys(CACHE, 16)),
        model_config=SimpleNamespace(max_model_len=4096),
    )

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def list_loras_async(self) -> set[int]:
        return {1, 2}

    async def reset_prefix_cache_async(self, running: bool, connector: bool) -> bool:
        raise RuntimeError("not now")


@dataclass
class Engine:
    index: int
    alive: bool = True
    client: Core = field(default_factory=Core)


class Cluster:
    """It notes what it is given."""

    hasher = None

    def __init__(self) -> None:
        self.engines = [Engine(0), Engine(1)]
        self.accepted: list[tuple[EngineCoreRequest, tuple[int, ...], Terms]] = []
        self.abandoned: list[tuple[str, bool]] = []

    def accept(self, request: EngineCoreRequest, blocks: tuple[int, ...], terms: Terms) -> None:
        if request.request_id == "poison":
            raise ValueError("it cannot be taken in")
        self.accepted.append((request, blocks, terms))

    def abandon(self, request_id: str, cancelled: bool) -> None:
        self.abandoned.append((request_id, cancelled))


class Keeper:
    """Of instances: none comes back, and none is silent."""

    silent: tuple[Engine, ...] = ()
    back: int | None = None

    @property
    def supervisor(self) -> Keeper:
        return self

    def retry_after(self, at: float) -> int | None:
        return self.back


@dataclass
class Switchboard:
    """The scheduler's side, and the other ends of its lines."""

    hub: FrontEnds
    cluster: Cluster
    keeper: Keeper
    said: list[str]
    clients: list[RemoteClient] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    turns: int = 0

    async def connect(self, index: int) -> RemoteClient:
        """Have a front end come: its client, which nobody listens for yet."""
        self.turns += 1
        address = f"ipc://{self.hub.directory}/line-{self.turns}"
        self.hub.join(index, address)
        line = Line(address, EngineCoreOutputs)
        self.lines.append(line)
        word, _ = await line.hear()
        assert isinstance(word, Welcome)
        client = RemoteClient(RemoteCluster(line, word.standing, None), line)
        self.clients.append(client)
        return client


@asynccontextmanager
async def switchboard(count: int = 2) -> AsyncIterator[Switchboard]:
    """So many front ends may come. Paths of sockets are short: a test's own directory may be too long."""
    with tempfile.TemporaryDirectory() as directory:
        async with _switchboard(Path(directory), count) as here:
            yield here


@asynccontextmanager
async def _switchboard(directory: Path, count: int) -> AsyncIterator[Switchboard]:
    said: list[str] = []
    hub, cluster, keeper = FrontEnds(count, directory), Cluster(), Keeper()
    fleet: Any = SimpleNamespace(cluster=cluster, patience=SimpleNamespace(now=0.0))
    hub.open(fleet, Attendance(cluster, keeper), Trouble(said.append))
    hub.promise(lambda: PROMISED)
    here = Switchboard(hub, cluster, keeper, said)
    try:
        yield here
    finally:
        hub.close()
        for line in here.lines:
            line.close()


async def heard(client: RemoteClient, words: int = 1) -> None:
    """Take so many words of the scheduler's process."""
    for _ in range(words):
        client.take(*await client._line.hear())


def request(name: str, tokens: int = 3) -> EngineCoreRequest:
    """A prompt of so many tokens."""
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(range(tokens)),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=8, seed=7, stop=["end"]),
        pooling_params=None,
        arrival_time=1.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id=f"outer-{name}",
    )


def made(name: str, *tokens: int, over: bool = False) -> EngineCoreOutput:
    """Output tokens of a request."""
    return EngineCoreOutput(name, list(tokens), finish_reason=FinishReason.STOP if over else None)
