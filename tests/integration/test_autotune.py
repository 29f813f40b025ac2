"""A server moves its own sliders: requests change from chat to summarization, and most miss their TPOT."""

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
TTFT_SLO = 20.0  # seconds; what a change does is waited for as long, and 10 s more
# TTFT has time to spare, so every prompt goes to the D-heavy instance; so has TPOT until the test has seen
# what it is beside such steps, on whatever machine this is.
FLAGS = (
    "--p-heavy",
    "1",
    "--d-heavy",
    "1",
    "--d-chunk",
    str(D_CHUNK),
    "--ttft-slo",
    str(TTFT_SLO),
    "--tpot-slo",
    "5",
    "--overload",
    "serve",
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


async def test_when_summaries_follow_chat_a_server_moves_its_sliders(tuned: Server, tmp_path: Path) -> None:
    answers: list[Answer] = []
    async with tuned.client() as client:
        chat = list(CHAT)
        await asyncio.gather(*(worked_off(client, chat, answers) for _ in range(STREAMS)))
        queue = list(SUMMARIES)
        streams = [asyncio.create_task(worked_off(client, queue, answers)) for _ in range(STREAMS)]
        promise = await missed(client, answers)
        before = (await client.get("/taichi/state")).json()

        async def moved() -> dict[str, Any] | None:
            """Whether a slider or margin has moved: by the fast loop S_D, by the slow one what helps."""
            state: dict[str, Any] = (await client.get("/taichi/state")).json()
            return state if len(state["autotune"]["changes"]) > len(before["autotune"]["changes"]) else None

        state = await until(moved, 200, "a slider has moved")
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
    check_log(tmp_path / "events.jsonl", answers, state["autotune"]["changes"][-1])


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
    assert (await client.get("/taichi/state")).json()["slo"] == {"ttft": TTFT_SLO, "tpot": tpot}


def check_log(path: Path, answers: list[Answer], change: dict[str, Any]) -> None:
    """The log says what was set and why; and a request that lived through it says so too."""
    with path.open() as entries:
        told = [event for event, _ in read(entries) if isinstance(event, Tuned)]
    assert all(event.act and event.why for event in told)
    assert change["at"] in [event.at for event in told]
    there = (line for answer in answers for line in lines(logged(path, answer.id)[0]))
    assert any(what == "sliders set themselves" for _, what, _ in there)
