"""After a prefill of two chunks, the first one's KV is where the decode will be before the second is done."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest
from load import PATH, Wish
from servers import Server, until

from taichi_serve.bench.client import stream

CHUNK = 1024  # of the P-heavy instance
PROMPT = 2 * CHUNK - 100


async def handed_over(client: httpx.AsyncClient, seed: int) -> dict[str, Any]:
    """The decode's leg of a request with a prompt that nobody has seen before."""
    chance = random.Random(seed)
    wish = Wish([chance.randrange(300, 4000) for _ in range(PROMPT)], 8)
    answer = await stream(client, PATH, wish.body())
    assert answer.ok, answer.error
    (view,) = (await client.get(f"/taichi/requests/{answer.id}")).json()["requests"]
    prefill, decode = view["legs"]
    assert (prefill["instance"], decode["instance"]) == ("i0", "i1")
    leg: dict[str, Any] = decode
    return leg


async def no_prefill_on_d_heavy(client: httpx.AsyncClient, chunk: int) -> None:
    """Or so many tokens a step again."""

    async def told() -> bool:
        state = (await client.get("/taichi/state")).json()
        return bool(state["instances"][1]["chunk"] == chunk)

    assert (await client.patch("/taichi/sliders", json={"d_chunk": chunk})).status_code == 200
    await until(told, 60, f"the D-heavy instance has a chunk of {chunk}")


@pytest.mark.parametrize("seed", [11, 12])
async def test_the_first_of_two_chunks_travels_while_the_second_is_computed(
    hybrid: Server, seed: int
) -> None:
    async with hybrid.client() as client:
        await no_prefill_on_d_heavy(client, 0)
        try:
            times = (await handed_over(client, seed))["timeline"]
        finally:
            await no_prefill_on_d_heavy(client, 256)
    assert 0 < times["ahead"] <= times["copied"] < times["left"]
    hybrid.quiet()


async def test_over_nixl_too(disaggregation: Server) -> None:
    async with disaggregation.client() as client:
        times = (await handed_over(client, 13))["timeline"]
    assert 0 < times["ahead"] <= times["copied"] < times["left"]
    disaggregation.quiet()
