"""What the device had to give up is found again in memory of the host, and says what it would have said.

One server of two instances with very little KV. Most tests use it up in the order in which they stand here.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from load import Wish, moves, streamed, streamed_and_moved, view, wrong
from servers import SOURCE, Server, eventually, processes
from test_cached import BACK_SECONDS, FLAGS, is_back, played
from test_fetch import FETCHES, only

from taichi_serve.bench.client import Answer

HOST = ("--kv-offloading-size", "0.125")  # GiB of each instance: 65,000 tokens, its device has 1,500
CHANCE = random.Random(23)


def words(count: int) -> list[int]:
    return [CHANCE.randrange(300, 4000) for _ in range(count)]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "events.jsonl"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, log: Path) -> Iterator[Server]:
    flags = (*FLAGS, *HOST, "--event-log", str(log))
    made = Server(tmp_path_factory.mktemp("tier"), *flags, env={"VLLM_SERVER_DEV_MODE": "1"})
    try:
        yield made.wait_ready()
    finally:
        made.end()


@pytest.fixture
def lender(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Which instance has a prefix is said by hand (fetches/)."""
    flags = ("--d-heavy", "2", "--d-chunk", "256", "--prefixes", "known", *FLAGS[8:], *HOST)
    env = {"PYTHONPATH": f"{FETCHES}{os.pathsep}{SOURCE}"}
    made = Server(tmp_path_factory.mktemp("lender"), *flags, env=env)
    try:
        yield made.wait_ready()
    finally:
        made.end()


async def said(single: Server, wishes: list[Wish]) -> list[Answer]:
    """By one instance that has room for all of them."""
    async with single.client() as client:
        return await streamed(client, wishes)


def on_hosts(server: Server) -> list[int]:
    """Blocks that each instance offloaded."""
    return [instance["host_blocks"] for instance in server.state()["instances"]]


async def prefilled(client: httpx.AsyncClient, answer: Answer) -> dict[str, Any]:
    """What the first leg of a request found; fields that are zero are left out."""
    log = (await view(client, answer.id))["log"]
    return next(row for row in log if row["type"] == "Prefilled")


async def counted(client: httpx.AsyncClient, name: str) -> float:
    """The sum of a metric over the instances."""
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


async def test_the_next_turn_finds_on_the_host_what_the_device_gave_up(
    server: Server, single: Server
) -> None:
    first = [Wish(words(300), 40) for _ in range(10)]
    reference = await said(single, first)
    async with server.client() as client:
        answers = [(await streamed(client, [wish]))[0] for wish in first]
        assert wrong(answers, reference) == []
        turns = [
            Wish([*wish.prompt, *answer.tokens, *words(20)], 40)
            for wish, answer in zip(first, answers, strict=True)
        ]
        server.quiet(10)
        assert sum(i["cached_blocks"] for i in server.state()["instances"]) < sum(on_hosts(server))
        second = await said(single, turns)
        answers = []
        for wish in turns:
            answers += await streamed(client, [wish])
            server.quiet(10)
        assert wrong(answers, second) == []
        rows = [await prefilled(client, answer) for answer in answers]
        hits = await counted(client, "vllm:external_prefix_cache_hits_total")
    assert all(row["cached"] >= 320 for row in rows), "every next turn finds its last one, with the answer"
    loaded = [row.get("loaded", 0) for row in rows]
    assert sum(count > 0 for count in loaded) >= 7, "and most of it where it was evicted to"
    assert hits == sum(loaded)


async def test_20_of_20_streams_that_move_and_are_evicted_say_what_one_instance_says_turn_after_turn(
    server: Server, single: Server
) -> None:
    turns = [Wish(words(CHANCE.randint(16, 300)), CHANCE.randint(32, 100)) for _ in range(20)]
    moved = loaded = 0
    async with server.client() as client:
        for number in range(3):
            reference = await said(single, turns)
            results = await streamed_and_moved(client, turns, seed=number, times=3)
            answers = [answer for answer, _ in results]
            assert wrong(answers, reference) == []
            moved += sum(moves(legs) for _, legs in results)
            for answer in answers:
                loaded += (await prefilled(client, answer)).get("loaded", 0)
            turns = [
                Wish([*wish.prompt, *answer.tokens, *words(10)], 64)
                for wish, answer in zip(turns, answers, strict=True)
            ]
    assert server.quiet(10)["requests"]["failed"] == 0
    assert moved > 60
    assert loaded > 1000


async def test_an_instance_that_dies_and_a_reset_leave_nothing_on_the_host(
    server: Server, single: Server
) -> None:
    kept = [Wish(words(200), 20) for _ in range(4)]
    reference = await said(single, kept)
    async with server.client() as client:
        assert wrong(await streamed(client, kept), reference) == []
        before = on_hosts(server)[1]
        assert before > 100
        processes(server, "i1")[0].kill()
        eventually(lambda: is_back(server), BACK_SECONDS, "i1 is back")
        # It has rehearsed its moves again, and that is all that is there.
        eventually(lambda: 0 <= (on_hosts(server)[1] or 0) < before / 2, 10, "that it has lost it is known")
        assert on_hosts(server)[0] > 0
        assert wrong(await streamed(client, kept), reference) == []
        server.quiet(10)
        assert (await client.post("/reset_prefix_cache")).status_code == 200
        assert on_hosts(server)[0] > 0, "as vLLM means it: the device's"
        answer = await client.post("/reset_prefix_cache", params={"reset_external": "true"})
        assert answer.status_code == 200
        eventually(lambda: on_hosts(server) == [0, 0], 10, "that nothing is there any more is known")
        assert wrong(await streamed(client, kept), reference) == []
    server.quiet(10)


async def test_what_a_peer_fetches_is_loaded_from_the_host_first(lender: Server, single: Server) -> None:
    known = [words(300) for _ in range(8)]
    wishes = [Wish([*prompt, *words(20)], 40) for prompt in known]
    reference = await said(single, wishes)
    async with lender.client() as client:
        await only(client, lender, "i0", "")
        for prompt in known:
            assert (await streamed(client, [Wish(prompt, 2)]))[0].ok
        assert lender.instance("i0")["cached_blocks"] < 8 * 9, "its device has not all of it any more"
        await only(client, lender, "i1", "i0")
        answers = []
        for wish in wishes:
            answers += await streamed(client, [wish])
        assert wrong(answers, reference) == []
        rows = [await prefilled(client, answer) for answer in answers]
    assert {row["instance"] for row in rows} == {"i1"}
    assert [row.get("fetched", 0) for row in rows] == [288] * 8
    lender.quiet(10)
    lender.stop()


def test_what_was_told_of_hosts_is_what_prompts_found_there(server: Server, log: Path) -> None:
    server.stop(logs_stay=True)
    here = played(log)
    assert here.known[:20] == here.found[:20], "those that came one after the other"
    assert sum(here.loaded[:20]) > 2000
