"""Several front ends before real engines: streams, moves, figures, the death of one, and the end of all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest
from load import PATH, Wish, push, wishes
from servers import Server, eventually, until

from taichi_serve.bench.client import Answer, stream

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]
ROUNDS = 6
FLAGS = ("--p-heavy", "1", "--d-heavy", "1", "--p-chunk", "256", "--d-chunk", "64")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    one = Server(tmp_path_factory.mktemp("several"), *FLAGS, "--api-server-count", "2").wait_ready()
    yield one
    one.stop(logs_stay=False)


def front_ends(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.state()["front_ends"]
    return found


def counted(server: Server, name: str) -> float:
    """The sum of a counter of a scrape, over all its labels."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name}{{"))


@dataclass
class Each:
    """A client for each request: a connection of its own, which goes to who has fewest."""

    server: Server

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=self.server.url, timeout=120) as client:
            yield client

    async def ask(self, wish: Wish, *on_tokens: Any, **more: Any) -> Answer:
        async with self.client() as client:
            return await stream(client, PATH, wish.body(**more), *on_tokens)


async def test_the_same_prompts_get_the_same_tokens_from_every_front_end_while_they_are_moved(
    server: Server,
) -> None:
    each, asked = Each(server), wishes(12, 3, prompt=(30, 300), output=(24, 48))
    alone = [await each.ask(wish) for wish in asked[:6]]
    running: set[str] = set()

    async def note(answer: Answer) -> None:
        running.add(answer.id)

    async def operator() -> None:
        async with each.client() as client:
            while True:
                await asyncio.sleep(0.02)
                for name in sorted(running):
                    with contextlib.suppress(httpx.HTTPError):
                        await push(client, name)

    moving = asyncio.create_task(operator())
    try:
        # How many moves come about before all are over is a matter of speed: a few rounds.
        for _ in range(ROUNDS):
            answers = await asyncio.gather(
                *(each.ask(wish, note) for wish in [*asked[:6], *asked[:6], *asked[6:]])
            )
            assert [answer.error for answer in answers if not answer.ok] == []
            assert [a.tokens for a in answers[:6]] == [a.tokens for a in alone]
            assert [a.tokens for a in answers[6:12]] == [a.tokens for a in alone]
            running.clear()
            moves = server.quiet(10)["moves"]
            if moves["hand-over"] + moves["operator"]:
                break
        else:
            raise AssertionError(f"nothing was moved in {ROUNDS} rounds")
    finally:
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)


async def test_requests_are_spread_and_figures_add_up(server: Server) -> None:
    accepted, ended = counted(server, "taichi_requests_ended_total"), "vllm:request_success_total"
    before, tokens = counted(server, ended), counted(server, "vllm:generation_tokens_total")
    each, seen = Each(server), set()

    async def note(answer: Answer) -> None:
        return None

    asking = [asyncio.create_task(each.ask(wish, note)) for wish in wishes(16, 5, (20, 60), (150, 160))]
    async with each.client() as client:

        async def both() -> bool:
            state = (await client.get("/taichi/state")).json()
            seen.update(one["name"] for one in state["front_ends"] if one["requests"])
            return len(seen) == 2

        await until(both, 30, "both front ends have requests")
    answers = await asyncio.gather(*asking)
    server.quiet(10)
    assert counted(server, "taichi_requests_ended_total") - accepted == 16
    assert counted(server, ended) - before == 16
    assert counted(server, "vllm:generation_tokens_total") - tokens == sum(len(a.tokens) for a in answers)


async def test_a_client_that_leaves_leaves_nothing_behind(server: Server) -> None:
    each = Each(server)
    wish = wishes(1, 9, (40, 50), (20, 30))[0]
    leaving = [asyncio.create_task(each.ask(wish, max_tokens=3000)) for _ in range(4)]
    await until(lambda: live(server, 4), 30, "all four run")
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    state = server.quiet(10)
    assert state["requests"]["cancelled"] >= 4


async def live(server: Server, count: int) -> bool:
    state = await asyncio.to_thread(server.state)
    return bool(state["requests"]["live"] == count)


async def test_the_death_of_one_ends_its_own_streams_only_and_it_comes_back(server: Server) -> None:
    each = Each(server)
    before = counted(server, "vllm:generation_tokens_total")
    wish = wishes(1, 11, (40, 50), (20, 30))[0]
    asking = [asyncio.create_task(each.ask(wish, max_tokens=1000)) for _ in range(6)]
    await until(lambda: live(server, 6), 30, "all six run")
    victim = max(front_ends(server), key=lambda one: one["requests"])
    os.kill(victim["pid"], signal.SIGKILL)
    answers = await asyncio.gather(*asking, return_exceptions=True)
    whole = [a for a in answers if isinstance(a, Answer) and a.ok]
    assert len(whole) == 6 - victim["requests"]
    assert all(len(answer.tokens) == 1000 for answer in whole)
    assert len({tuple(answer.tokens) for answer in whole}) <= 1
    eventually(lambda: all(one["serves"] for one in front_ends(server)), 120, "it is back")
    server.quiet(10)
    again = next(one for one in front_ends(server) if one["name"] == victim["name"])
    assert (again["restarts"], again["last_loss"]) == (1, "killed by SIGKILL")
    assert again["pid"] != victim["pid"]
    assert counted(server, "vllm:generation_tokens_total") >= before + 1000 * len(whole)
    answers = await asyncio.gather(*(each.ask(wish) for _ in range(8)))
    assert all(answer.ok for answer in answers)


async def test_all_of_them_end_with_the_server_even_when_it_is_killed(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    server = Server(tmp_path_factory.mktemp("killed"), "--d-heavy", "1", "--api-server-count", "2")
    try:
        server.wait_ready()
        family = server.family()
        server.signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert alive == []
    finally:
        server.end()
