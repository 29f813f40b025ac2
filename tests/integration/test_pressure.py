"""A real engine with room for 1,280 tokens of KV, and two answers that need more: best effort makes way for a
good request, and who can go on elsewhere for one that cannot, whichever came first."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from load import PATH, Wish, view, wishes
from servers import Server, until

from taichi_serve.bench.client import Answer, stream

BLOCK, BLOCKS = 128, 10  # tokens of a block on a CPU; vLLM keeps one more
FLAGS = (
    *("--d-heavy", "1", "--d-chunk", "256", "--max-model-len", "1024", "--no-enable-prefix-caching"),
    *("--kv-cache-memory-bytes", str((BLOCKS + 1) * BLOCK * 2048)),
    *("--overload", "demote", "--ttft-slo", "60", "--tpot-slo", "5"),
)
LEARNING = wishes(4, seed=1, prompt=(200, 256), output=(2, 4))
# Both have 256 prompt tokens. When each has about 640 tokens, all blocks are taken.
OLDER, YOUNGER = Wish(list(range(300, 556)), 700), Wish(list(range(600, 856)), 500)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("pressure"), *FLAGS)
    try:
        yield server.wait_ready()
        server.stop()
    finally:
        server.end()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """Of a server that knows how fast it is."""
    async with server.client() as client:
        for wish in LEARNING:
            (await client.post(PATH, json=wish.body())).raise_for_status()
        yield client


async def preemptions(client: httpx.AsyncClient) -> tuple[float, float]:
    """How many requests are over, and how often they were preempted, all together."""
    text = (await client.get("/metrics/")).text
    found = [re.findall(rf"vllm:request_num_preemptions_{of}\{{.*\}} (\S+)", text) for of in ("count", "sum")]
    over, times = (sum(map(float, values)) for values in found)
    return over, times


async def together(
    client: httpx.AsyncClient, older: dict[str, Any], younger: dict[str, Any], headers: dict[str, str]
) -> tuple[list[Answer], list[float]]:
    """The younger one comes when the older one, which has these headers, has begun to decode, and is over
    before it. Their answers, and how often each was preempted."""
    begun = asyncio.Event()

    async def on_tokens(answer: Answer) -> None:
        begun.set()

    before, times = await preemptions(client)
    answering = asyncio.create_task(stream(client, PATH, older, on_tokens, headers))
    await asyncio.wait_for(begun.wait(), 60)
    answers = [await stream(client, PATH, younger)]
    assert not answering.done()
    counted = []
    for number in (1, 2):
        if number == 2:
            answers.insert(0, await answering)

        async def told(number: int = number) -> bool:
            return (await preemptions(client))[0] == before + number

        await until(told, 10, f"{number} requests are over")
        now = (await preemptions(client))[1]
        counted.insert(0, now - times)
        times = now
    return answers, counted


async def test_best_effort_is_preempted_and_a_good_request_is_not(client: httpx.AsyncClient) -> None:
    # A millisecond is too little for any prompt, so the older one is best effort.
    soon = {"x-slo-ttft-ms": "1"}
    (late, good), (of_late, of_good) = await together(client, OLDER.body(), YOUNGER.body(), soon)
    assert (late.ok, good.ok) == (True, True)
    (placed,) = [entry for entry in (await view(client, late.id))["log"] if entry["type"] == "Prefill"]
    assert placed["best_effort"]
    assert of_late > 0
    assert of_good == 0
    for answer, wish in ((late, OLDER), (good, YOUNGER)):
        assert answer.tokens == (await stream(client, PATH, wish.body())).tokens


async def test_a_request_that_is_bound_to_its_instance_is_not_preempted_beside_one_that_is_not(
    client: httpx.AsyncClient,
) -> None:
    drawn = YOUNGER.body(seed=7, temperature=0.8)
    (free, bound), (of_free, of_bound) = await together(client, OLDER.body(), drawn, {})
    assert (free.ok, bound.ok) == (True, True)
    assert of_free > 0
    assert of_bound == 0
    assert bound.tokens == (await stream(client, PATH, drawn)).tokens
