"""Prompts whose first blocks another instance has fetch them, and say what they would have said.

One server of three instances with little KV; which one holds a prefix is said by hand (fetches/). The tests
use it up in the order in which they stand here.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from load import PATH, Wish, streamed, view, wrong
from servers import SOURCE, Server, eventually, processes, until

from taichi_serve.bench.client import Answer, stream

BLOCK = 128  # of a CPU instance
FETCHES = Path(__file__).parent / "fetches"
CHANCE = random.Random(17)
KV_TOKENS = 32768  # of each instance
NAMES = ("i0", "i1", "i2")


def prompts(count: int, length: tuple[int, int]) -> list[list[int]]:
    return [[CHANCE.randrange(300, 4000) for _ in range(CHANCE.randint(*length))] for _ in range(count)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"PYTHONPATH": f"{FETCHES}{os.pathsep}{SOURCE}"}
    flags = ("--d-heavy", "3", "--d-chunk", "256", "--move-timeout", "2", "--restarts", "0")
    flags += ("--prefixes", "known")  # nothing is fetched but what is said by hand
    little = ("--kv-cache-memory-bytes", str(KV_TOKENS * 2048))
    made = Server(tmp_path_factory.mktemp("fetch"), *flags, *little, env=env)
    try:
        yield made.wait_ready()
    finally:
        made.end()


async def only(client: httpx.AsyncClient, server: Server, name: str, holder: str) -> None:
    """From now on prompts are computed on this instance, and fetch their prefix from the holder."""
    (server.directory / "holder").write_text(holder)
    alive = [i["name"] for i in server.state()["instances"] if i["alive"]]
    for other in (name, *(one for one in alive if one != name)):
        what = "resume" if other == name else "drain"
        (await client.post(f"/taichi/instances/{other}/{what}")).raise_for_status()

    async def so() -> bool:
        draining = {i["name"]: i["draining"] for i in server.state()["instances"] if i["alive"]}
        return draining == {one: one != name for one in alive}

    await until(so, 10, f"only {name} takes prompts")


async def prefilled(client: httpx.AsyncClient, answer: Answer) -> dict[str, Any]:
    """What the first leg of a request found; fields that are zero are left out."""
    log = (await view(client, answer.id))["log"]
    return next(row for row in log if row["type"] == "Prefilled")


def full_blocks(prompt: list[int]) -> int:
    """Tokens of the blocks that can be fetched: the last token is computed in any case."""
    return (len(prompt) - 1) // BLOCK * BLOCK


async def said(single: Server, wishes: list[Wish]) -> list[Answer]:
    async with single.client() as client:
        return await streamed(client, wishes)


async def seed(client: httpx.AsyncClient, server: Server, name: str, known: list[list[int]]) -> None:
    """Have this instance compute these prompts, and hold them in its prefix cache."""
    await only(client, server, name, "")
    answers = await streamed(client, [Wish(prompt, 2) for prompt in known])
    assert all(answer.ok for answer in answers)


async def test_what_is_fetched_is_the_same_to_the_last_token_and_is_there_for_the_next(
    server: Server, single: Server
) -> None:
    known = prompts(20, (150, 900))
    wishes = [Wish([*prompt, *more], 40) for prompt, more in zip(known, prompts(20, (5, 60)), strict=True)]
    reference = await said(single, wishes)
    async with server.client() as client:
        await seed(client, server, "i0", known)
        await only(client, server, "i1", "i0")
        answers = await streamed(client, wishes)
        assert wrong(answers, reference) == []
        for answer, prompt in zip(answers, known, strict=True):
            first = await prefilled(client, answer)
            assert first["instance"] == "i1"
            assert first["fetched"] == first["cached"] == len(prompt) // BLOCK * BLOCK
            began, ended = first["fetch"]
            assert 0 < began < ended < first["at"]
        again = await streamed(client, wishes)
        assert wrong(again, reference) == []
        for answer, wish in zip(again, wishes, strict=True):
            first = await prefilled(client, answer)
            assert (first["cached"], first.get("fetched", 0)) == (full_blocks(list(wish.prompt)), 0)
    server.quiet(10)


@pytest.mark.parametrize(
    "bound",
    [
        {"seed": 11, "temperature": 0.9},
        {"presence_penalty": 1.5},
        {"structured_outputs": {"regex": "([a-z]{3,8} ){40}"}},
    ],
    ids=["seed", "penalty", "grammar"],
)
async def test_a_request_that_is_bound_to_its_instance_fetches_its_prompt_all_the_same(
    server: Server, single: Server, bound: dict[str, Any]
) -> None:
    known = prompts(4, (150, 900))
    wishes = [Wish([*prompt, 7, 8, 9], 40) for prompt in known]
    async with single.client() as client:
        reference = await streamed(client, wishes, **bound)
    async with server.client() as client:
        await seed(client, server, "i0", known)
        await only(client, server, "i1", "i0")
        answers = await streamed(client, wishes, **bound)
        assert wrong(answers, reference) == []
        for answer, prompt in zip(answers, known, strict=True):
            assert (await prefilled(client, answer))["fetched"] == len(prompt) // BLOCK * BLOCK
    server.quiet(10)


async def test_a_prefill_that_is_handed_over_fetches_and_moves_only_what_its_target_does_not_have(
    server: Server, single: Server
) -> None:
    known = prompts(8, (300, 600))
    wishes = [Wish([*prompt, *more], 40) for prompt, more in zip(known, prompts(8, (20, 40)), strict=True)]
    reference = await said(single, wishes)
    async with server.client() as client:
        await seed(client, server, "i1", known)
        await only(client, server, "i1", "i1")
        (await client.post("/taichi/instances/i0/resume")).raise_for_status()
        apart = {"p_heavy": 1, "d_heavy": 2, "p_chunk": 256, "d_chunk": 0}
        (await client.patch("/taichi/sliders", json=apart)).raise_for_status()
        answers = await streamed(client, wishes)
        assert wrong(answers, reference) == []
        for answer, prompt in zip(answers, known, strict=True):
            first = await prefilled(client, answer)
            assert (first["instance"], first["fetched"]) == ("i0", len(prompt) // BLOCK * BLOCK)
            log = (await view(client, answer.id))["log"]
            flowed = next(row for row in log if row["type"] == "Flowed")
            assert flowed["instance"] == "i1"
            assert flowed["kv_tokens"] <= 60 + BLOCK, "what i1 had was copied again"
            assert flowed["reused"] >= len(prompt)
        together = {"p_heavy": 0, "d_heavy": 3, "p_chunk": 256, "d_chunk": 256}
        (await client.patch("/taichi/sliders", json=together)).raise_for_status()
    server.quiet(10)


async def test_what_the_holder_has_lost_is_computed(server: Server, single: Server) -> None:
    known = prompts(40, (900, 1000))  # more than it has room for
    wishes = [Wish([*prompt, 7, 8, 9], 20) for prompt in known]
    reference = await said(single, wishes)
    async with server.client() as client:
        await seed(client, server, "i0", known)
        await only(client, server, "i2", "i0")
        answers = await streamed(client, wishes)
        assert wrong(answers, reference) == []
        fetched = [(await prefilled(client, answer)).get("fetched", 0) for answer in answers]
    assert 0 < sum(fetched) < sum(len(prompt) // BLOCK * BLOCK for prompt in known)
    assert 0 in fetched
    server.quiet(10)


async def test_where_the_holder_stands_still_a_prompt_is_computed_without_it(
    server: Server, single: Server
) -> None:
    known = prompts(4, (300, 600))
    wishes = [Wish([*prompt, 7, 8, 9], 40) for prompt in known]
    reference = await said(single, wishes)
    async with server.client() as client:
        await seed(client, server, "i0", known)
        await only(client, server, "i1", "i0")
        there = processes(server, "i0")
        for process in there:
            process.suspend()
        try:
            answers = await asyncio.wait_for(streamed(client, wishes), 60)
        finally:
            for process in there:
                process.resume()
        assert wrong(answers, reference) == []
        assert [(await prefilled(client, answer)).get("fetched", 0) for answer in answers] == [0] * 4
    server.quiet(20)  # what it pinned when it went on is let go


async def test_when_the_holder_is_killed_nobody_sees_anything(server: Server, single: Server) -> None:
    known = prompts(24, (300, 600))
    wishes = [Wish([*prompt, 7, 8, 9], 40) for prompt in known]
    reference = await said(single, wishes)
    async with server.client() as client:
        await seed(client, server, "i0", known)
        await only(client, server, "i1", "i0")
        begun = asyncio.Event()

        async def note(answer: Answer) -> None:
            begun.set()

        tasks = [asyncio.create_task(stream(client, PATH, wish.body(), note)) for wish in wishes]
        await asyncio.wait_for(begun.wait(), 60)
        processes(server, "i0")[0].kill()
        answers = await asyncio.gather(*tasks)
        assert wrong(answers, reference) == []
        eventually(lambda: not server.instance("i0")["alive"], 10, "its end is known")
        late = await streamed(client, wishes[:2])  # the holder that is named is no more
        assert wrong(late, reference[:2]) == []
    state = server.quiet(10)
    assert state["requests"]["failed"] == 0
