"""Algorithm 1 by itself: nobody asks for a move, no instance is drained or lost. Chats outgrow the KV of the
D-heavy instance, so its longest are degraded; prompts keep the P-heavy one busy, so they flow back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from statistics import median

import httpx
import pytest
from load import PATH, Wish, streamed, view, wishes, wrong
from servers import Server, until

from taichi_serve.bench.client import Answer, stream

KV_BYTES = 12 << 20  # 6,144 tokens an instance
STREAMS = 16  # chats at a time, 400 tokens each in the mean: they need more than that
CHATS = wishes(200, seed=11, prompt=(20, 60), output=(400, 900))
PROMPTS = wishes(400, seed=12, prompt=(1500, 2500), output=(1, 1))
FIRST = 10  # chats from whose TPOT the SLO follows
LOOSE = 5.0  # seconds a token until then: everybody has slack
SHARE = 2.0  # of that TPOT. A step with a whole prompt takes many times as long as one of decodes
FLAGS = (
    *("--p-heavy", "1", "--d-heavy", "1", "--p-chunk", "2048", "--d-chunk", "64"),
    *("--ttft-slo", "30", "--tpot-slo", str(LOOSE), "--kv-cache-memory-bytes", str(KV_BYTES)),
    *("--block-size", "32"),  # of blocks with 128 tokens, as is usual on CPUs, chats would fill many half
)


@pytest.fixture
def flowing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """i0 P-heavy, i1 D-heavy, with little KV."""
    server = Server(tmp_path_factory.mktemp("flowing"), *FLAGS)
    try:
        yield server.wait_ready()
    finally:
        server.end()


async def chatted(client: httpx.AsyncClient, queue: list[int], answers: dict[int, Answer]) -> None:
    """One chat after the other until nothing is left."""
    while queue:
        number = queue.pop(0)
        answers[number] = await stream(client, PATH, CHATS[number].body())


async def prompted(client: httpx.AsyncClient, chats: list[int], prompts: list[Wish]) -> None:
    """One prompt after the other, for as long as there are chats to begin."""
    while chats and prompts:
        answer = await stream(client, PATH, prompts.pop().body())
        assert answer.ok, answer.error


async def flown(client: httpx.AsyncClient, queue: list[int], answers: dict[int, Answer]) -> None:
    """Promise a TPOT that a chat keeps on the D-heavy instance, and not on the P-heavy one; end the load when
    chats have been degraded and have flowed back."""

    async def enough() -> bool:
        return len(answers) >= FIRST

    await until(enough, 200, "some chats are over")
    tpot = SHARE * median(answer.tpot for answer in answers.values())
    assert (await client.patch("/taichi/slo", json={"tpot": tpot})).status_code == 200

    async def both() -> bool:
        moves = (await client.get("/taichi/state")).json()["moves"]
        return bool(moves["degrade"] and moves["backflow"])

    await until(both, 300, "a chat was degraded and one flowed back")
    queue.clear()


async def moves_of(client: httpx.AsyncClient, answer: Answer) -> list[str]:
    """Why this request moved, each time that it was decided."""
    log = (await view(client, answer.id))["log"]
    return [row["move"] for row in log if row["type"] in ("Flow", "Decode")]


async def test_decodes_are_degraded_and_flow_back_by_themselves_and_say_the_same(
    flowing: Server, single: Server
) -> None:
    answers: dict[int, Answer] = {}
    queue, prompts = list(range(len(CHATS))), list(PROMPTS)
    async with flowing.client() as client:
        async with asyncio.TaskGroup() as load:
            for _ in range(STREAMS):
                load.create_task(chatted(client, queue, answers))
            for _ in range(2):  # while one is computed the other waits
                load.create_task(prompted(client, queue, prompts))
            load.create_task(flown(client, queue, answers))
        ways = [await moves_of(client, answer) for answer in answers.values()]
    moves = flowing.quiet(10)["moves"]
    assert any("degrade" in way for way in ways)
    assert any("backflow" in way[way.index("degrade") :] for way in ways if "degrade" in way)
    assert (moves["operator"], moves["drain"], moves["rescue"]) == (0, 0, 0)
    async with single.client() as client:
        reference = await streamed(client, [CHATS[number] for number in answers])
    assert wrong(list(answers.values()), reference) == []
    flowing.stop()
