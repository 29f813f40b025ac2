"""Sliders move and instances are drained while requests run: nothing is dropped, and no token differs."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from load import PATH, completed, instances_of, streamed, wishes
from servers import Server, until

from taichi_serve.bench.client import Answer, stream

WISHES = wishes(40, seed=3, prompt=(16, 1200), output=(48, 160))
AS_STARTED = {"p_heavy": 1, "d_heavy": 1, "p_chunk": 1024, "d_chunk": 256}
# Chunks down and up, disaggregation, aggregation, P-heavy turned into D-heavy and back, two P-heavy ones.
TURNS: list[dict[str, int]] = [
    {"p_chunk": 64, "d_chunk": 32},
    {"p_chunk": 2048, "d_chunk": 0},
    {"d_chunk": 512},
    {"p_heavy": 0, "d_heavy": 2},
    {"p_heavy": 2, "d_heavy": 0},
    AS_STARTED,
]


@pytest.fixture(scope="module")
def reference(single: Server) -> list[Answer]:
    """What one instance says."""

    async def run() -> list[Answer]:
        async with single.client() as client:
            return await streamed(client, WISHES)

    return asyncio.run(run())


def check_same(answers: list[Answer], reference: list[Answer]) -> None:
    assert [answer.error for answer in answers if not answer.ok] == []
    assert [i for i, (a, r) in enumerate(zip(answers, reference, strict=True)) if a.tokens != r.tokens] == []


async def in_turn(client: httpx.AsyncClient) -> tuple[list[asyncio.Task[Answer]], asyncio.Event]:
    """Start the requests one after the other, so that there are prompts and decodes at any time."""
    started = asyncio.Event()

    async def one(number: int) -> Answer:
        await asyncio.sleep(0.1 * number)  # the arrival time of the request
        if number == 8:
            started.set()
        return await stream(client, PATH, WISHES[number].body())

    return [asyncio.create_task(one(number)) for number in range(len(WISHES))], started


async def seen(client: httpx.AsyncClient, **sliders: int) -> dict[str, Any]:
    """The state, once the instances are what the sliders say and the prompts that waited are through."""

    async def told() -> dict[str, Any] | None:
        state = (await client.get("/taichi/state")).json()
        kinds = ["P-heavy"] * sliders["p_heavy"] + ["D-heavy"] * sliders["d_heavy"]
        chunks = {"P-heavy": sliders["p_chunk"], "D-heavy": sliders["d_chunk"]}
        wanted = [(kind, chunks[kind]) for kind in kinds]
        now = [(i["kind"], i["chunk"]) for i in state["instances"]]
        return state if state["sliders"] == sliders and now == wanted else None

    return await until(told, 60, f"the instances follow {sliders}")


async def test_sliders_move_under_load_and_nothing_is_dropped(
    hybrid: Server, reference: list[Answer]
) -> None:
    before = hybrid.quiet(10)["requests"]
    async with hybrid.client() as client:
        tasks, started = await in_turn(client)
        await started.wait()
        now = dict(AS_STARTED)
        for turn in TURNS:
            now |= turn
            answer = await client.patch("/taichi/sliders", json=turn)
            assert (answer.status_code, answer.json()) == (200, now)
            await seen(client, **now)
        check_same(await asyncio.gather(*tasks), reference)
    after = hybrid.quiet()["requests"]
    assert after["finished"] - before["finished"] == len(WISHES)
    assert after["failed"] == before["failed"]


async def test_after_p_heavy_and_d_heavy_changed_places_prompts_and_decodes_do_too(hybrid: Server) -> None:
    async with hybrid.client() as client:
        try:
            await client.patch("/taichi/sliders", json={"p_heavy": 0, "d_heavy": 2, "d_chunk": 256})
            await seen(client, p_heavy=0, d_heavy=2, p_chunk=1024, d_chunk=256)
            await completed(client, WISHES[0].body(), "cmpl-all-alike")
            assert len(await instances_of(client, "cmpl-all-alike")) == 1  # nobody hands over
            await client.patch("/taichi/sliders", json={"p_heavy": 1, "d_heavy": 1, "d_chunk": 0})
            await seen(client, p_heavy=1, d_heavy=1, p_chunk=1024, d_chunk=0)
            await completed(client, WISHES[0].body(), "cmpl-apart")
            assert await instances_of(client, "cmpl-apart") == ["i0", "i1"]
        finally:
            await client.patch("/taichi/sliders", json=AS_STARTED)
            await seen(client, **AS_STARTED)


@pytest.mark.parametrize("name", ["i0", "i1"])
async def test_an_instance_is_drained_under_load_and_comes_back(
    name: str, hybrid: Server, reference: list[Answer]
) -> None:
    async with hybrid.client() as client:
        tasks, started = await in_turn(client)
        await started.wait()
        try:
            assert (await client.post(f"/taichi/instances/{name}/drain")).status_code == 202

            async def empty() -> bool:
                state = (await client.get("/taichi/state")).json()
                here = next(i for i in state["instances"] if i["name"] == name)
                working = here["decodes"] or here["queued_prefill_tokens"] or here["arriving"]
                return here["draining"] and not working and here["kv_tokens"] == 0

            await until(empty, 60, f"{name} is empty")
            other = "i1" if name == "i0" else "i0"
            await completed(client, WISHES[1].body(), f"cmpl-drained-{name}")
            assert set(await instances_of(client, f"cmpl-drained-{name}")) == {other}
        finally:
            assert (await client.post(f"/taichi/instances/{name}/resume")).status_code == 202
        check_same(await asyncio.gather(*tasks), reference)
    assert not any(instance["draining"] for instance in hybrid.quiet()["instances"])
