"""A request whose long prompt is still being hashed can be ended like any other."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from taichi_serve.classes import Terms
from taichi_serve.frontend.client import ClusterClient, ClusterLLM


class Cluster:
    """One that hashes as long as it is told to."""

    engines: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.hashing, self.hashed = asyncio.Event(), asyncio.Event()
        self.accepted: list[tuple[str, tuple[int, ...]]] = []
        self.abandoned: list[str] = []

    async def blocks(self, request: Any) -> tuple[int, ...]:
        self.hashing.set()
        await self.hashed.wait()
        return (5, 6)

    def accept(self, request: Any, blocks: tuple[int, ...], _: Terms) -> None:
        self.accepted.append((request.request_id, blocks))

    def abandon(self, request_id: str, cancelled: bool) -> None:
        self.abandoned.append(request_id)


REQUEST: Any = SimpleNamespace(request_id="a", external_req_id="a")


async def coming() -> tuple[Cluster, ClusterClient, asyncio.Task[None]]:
    """Request `a` is being hashed."""
    cluster: Any = Cluster()
    client = ClusterClient(cluster, asyncio.Queue())
    adding = asyncio.create_task(client.add_request_async(REQUEST))
    await cluster.hashing.wait()
    return cluster, client, adding


async def test_it_is_accepted_with_its_hashes() -> None:
    cluster, client, adding = await coming()
    assert cluster.accepted == []
    cluster.hashed.set()
    await adding
    assert cluster.accepted == [("a", (5, 6))]
    assert client.coming == set()


async def test_it_is_never_accepted_when_it_was_ended_meanwhile() -> None:
    cluster, client, adding = await coming()
    await client.abort_requests_async(["a"])
    cluster.hashed.set()
    await adding
    assert cluster.accepted == []


async def test_it_is_forgotten_when_its_client_leaves() -> None:
    cluster, client, adding = await coming()
    adding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adding
    assert (cluster.accepted, client.coming) == ([], set())


async def test_vllms_output_processing_forgets_it_too() -> None:
    cluster: Any = Cluster()
    llm: Any = object.__new__(ClusterLLM)
    llm.engine_core = ClusterClient(cluster, asyncio.Queue())
    llm.output_processor = OutputProcessor(None, log_stats=False)
    llm.log_requests, llm.check_admission = False, lambda **_: None
    params = SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA)
    request = EngineCoreRequest("a", [1, 2, 3], None, params, None, 0.0, None, None, None)
    request.external_req_id = "a"
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "a")
    adding = asyncio.create_task(llm._add_request(request, None, None, 0, queue))
    await cluster.hashing.wait()
    assert llm.output_processor.has_unfinished_requests()
    adding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adding
    assert not llm.output_processor.has_unfinished_requests()
    assert cluster.accepted == []
