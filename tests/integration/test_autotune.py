"""A server moves its own sliders: the requests change from chat to summarization, and S_D follows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from load import PATH, Wish, wishes
from servers import Server, until

from taichi_serve.bench.client import Answer, stream
from taichi_serve.commands.explain import lines
from taichi_serve.commands.records import logged
from taichi_serve.eventlog import read
from taichi_serve.messages import Tuned

STREAMS = 6
D_CHUNK = 512
# Steps with 512 prompt tokens take more than these 40 ms a token on any CPU; steps without do not. TTFT has
# all the time in the world, so every prompt goes to the D-heavy instance.
FLAGS = (
    "--p-heavy",
    "1",
    "--d-heavy",
    "1",
    "--d-chunk",
    str(D_CHUNK),
    "--ttft-slo",
    "60",
    "--tpot-slo",
    "0.04",
)
CHAT = wishes(30, seed=1, prompt=(8, 24), output=(40, 60))
SUMMARIES = wishes(400, seed=2, prompt=(1000, 1500), output=(30, 50))


@pytest.fixture
def tuned(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that may move its sliders, with an event log; Algorithm 2 keeps no prompt from its decodes."""
    log = ("--event-log", str(tmp_path / "events.jsonl"))
    server = Server(tmp_path_factory.mktemp("tuned"), *FLAGS, "--tpot-margin", "10", "--autotune", "on", *log)
    try:
        yield server.wait_ready()
    finally:
        server.end()


async def worked_off(client: httpx.AsyncClient, queue: list[Wish], answers: list[Answer]) -> None:
    """One stream after the other until nothing is left."""
    while queue:
        answers.append(await stream(client, PATH, queue.pop().body()))


async def test_summaries_after_chat_make_the_d_heavy_chunk_smaller(tuned: Server, tmp_path: Path) -> None:
    answers: list[Answer] = []
    async with tuned.client() as client:
        chat = list(CHAT)
        await asyncio.gather(*(worked_off(client, chat, answers) for _ in range(STREAMS)))
        before = (await client.get("/taichi/state")).json()
        queue = list(SUMMARIES)
        streams = [asyncio.create_task(worked_off(client, queue, answers)) for _ in range(STREAMS)]

        async def smaller() -> dict[str, Any] | None:
            state: dict[str, Any] = (await client.get("/taichi/state")).json()
            moved = [c for c in state["autotune"]["changes"] if c["at"] not in known]
            return state if moved and state["sliders"]["d_chunk"] < before["sliders"]["d_chunk"] else None

        known = [change["at"] for change in before["autotune"]["changes"]]
        state = await until(smaller, 200, "the D-heavy chunk is smaller")
        queue.clear()
        await asyncio.gather(*streams)
        metrics = (await client.get("/metrics")).text
        await promised(client)
    assert [answer.error for answer in answers if not answer.ok] == []
    assert state["autotune"]["mode"] == "on"
    assert state["autotune"]["view"]["slow"] > 0
    assert 'taichi_tuned_total{act="made"}' in metrics
    assert 'taichi_trouble_total{what="autotune"} 0.0' in metrics
    tuned.stop()
    check_log(tmp_path / "events.jsonl", answers)


async def promised(client: httpx.AsyncClient) -> None:
    """The SLO can be changed while it serves, to something that makes sense."""
    answer = await client.patch("/taichi/slo", json={"tpot": 0.05})
    assert (answer.status_code, answer.json()) == (200, {"ttft": 60.0, "tpot": 0.05})

    async def known() -> bool:
        slo = (await client.get("/taichi/state")).json()["slo"]
        return bool(slo == {"ttft": 60.0, "tpot": 0.05})

    await until(known, 10, "the SLO is what was promised")
    for body in ({"tpot": -1}, {"tpot": "fast"}, {"ttft": True}, {"goodput": 1}, {}):
        assert (await client.patch("/taichi/slo", json=body)).status_code == 400, body


def check_log(path: Path, answers: list[Answer]) -> None:
    """The log says what was set and why; and a request that lived through it says so too."""
    with path.open() as entries:
        told = [event for event, _ in read(entries) if isinstance(event, Tuned)]
    assert told
    assert all(event.act and "S_D" in event.why for event in told[:1])
    there = (line for answer in answers for line in lines(logged(path, answer.id)[0]))
    assert any(what == "sliders set themselves" for _, what, _ in there)
