"""A server moves its own sliders: the requests change from chat to summarization, and S_D follows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from statistics import median
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
# TTFT has all the time in the world, so every prompt goes to the D-heavy instance; and so has TPOT until the
# test has seen what it is beside such steps, on whatever machine this is.
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
    "5",
)
CHAT = wishes(30, seed=1, prompt=(8, 24), output=(40, 60))
SUMMARIES = wishes(400, seed=2, prompt=(1000, 1500), output=(30, 50))
SEEN = 12  # summaries from which the SLO follows
SHORT = 0.7  # of the TPOT that they had


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
        promise = await missed(client, answers)
        state = await until(smaller, 200, "the D-heavy chunk is smaller")
        queue.clear()
        await asyncio.gather(*streams)
        metrics = (await client.get("/metrics")).text
        await promised(client, promise)
    assert [answer.error for answer in answers if not answer.ok] == []
    assert state["autotune"]["mode"] == "on"
    assert {"ttft", "tpot", "slow", "good"} <= set(state["autotune"]["view"])
    assert 'taichi_tuned_total{act="made"}' in metrics
    assert 'taichi_trouble_total{what="autotune"} 0.0' in metrics
    tuned.stop()
    check_log(tmp_path / "events.jsonl", answers)


async def missed(client: httpx.AsyncClient, answers: list[Answer]) -> float:
    """Promise a TPOT (seconds) that most summaries miss; what it is."""

    async def seen() -> bool:
        return len(answers) >= len(CHAT) + SEEN

    await until(seen, 120, "some summaries are through")
    tpot = SHORT * median(answer.tpot for answer in answers[len(CHAT) :])
    assert (await client.patch("/taichi/slo", json={"tpot": tpot})).status_code == 200
    return tpot


async def promised(client: httpx.AsyncClient, tpot: float) -> None:
    """The SLO is what was promised, and what makes no sense is not."""
    for body in ({"tpot": -1}, {"tpot": "fast"}, {"ttft": True}, {"goodput": 1}, {}):
        assert (await client.patch("/taichi/slo", json=body)).status_code == 400, body
    assert (await client.get("/taichi/state")).json()["slo"] == {"ttft": 60.0, "tpot": tpot}


def check_log(path: Path, answers: list[Answer]) -> None:
    """The log says what was set and why; and a request that lived through it says so too."""
    with path.open() as entries:
        told = [event for event, _ in read(entries) if isinstance(event, Tuned)]
    assert all(event.act for event in told)
    assert any("S_D" in event.why for event in told)
    there = (line for answer in answers for line in lines(logged(path, answer.id)[0]))
    assert any(what == "sliders set themselves" for _, what, _ in there)
