"""500 requests, 30 % of them cancelled at random moments, while an operator moves others about."""

from __future__ import annotations

import asyncio
import contextlib
import random

import httpx
from load import PATH, Wish, push, wishes
from servers import Server

from taichi_serve.bench.client import Answer, stream

COUNT, CANCELLED, AT_ONCE = 500, 150, 64
# Seconds until its client leaves. Small ones meet requests in a queue, in prefill or held for their move.
PATIENCE = (0.0, 0.01, 0.05, 0.1, 0.3, 0.6, 1.0, 2.0)


async def all_of_them(client: httpx.AsyncClient, seed: int) -> tuple[int, int]:
    """Send the 500; how many were seen to the end, and how many of those that were left had begun."""
    chance = random.Random(seed)
    leaves = set(chance.sample(range(COUNT), CANCELLED))
    asked = wishes(COUNT, seed, prompt=(16, 600), output=(8, 96))
    gate = asyncio.Semaphore(AT_ONCE)
    running: set[str] = set()
    begun = 0

    async def note(answer: Answer) -> None:
        running.add(answer.id)

    async def one(number: int, wish: Wish) -> Answer | None:
        nonlocal begun
        async with gate:
            mine: list[str] = []

            async def on_tokens(answer: Answer) -> None:
                mine.append(answer.id)
                await note(answer)

            patience = chance.choice(PATIENCE) if number in leaves else None
            # Who leaves has asked for far more than comes in that time.
            body = wish.body(max_tokens=3000) if number in leaves else wish.body()
            try:
                return await asyncio.wait_for(stream(client, PATH, body, on_tokens), patience)
            except TimeoutError:
                begun += bool(mine)
                return None
            finally:
                running.difference_update(mine)

    async def operator() -> None:
        while True:
            await asyncio.sleep(0.01)
            if running:
                with contextlib.suppress(httpx.HTTPError):
                    await push(client, chance.choice(sorted(running)))

    moving = asyncio.create_task(operator())
    answers = await asyncio.gather(*(one(number, wish) for number, wish in enumerate(asked)))
    moving.cancel()
    await asyncio.gather(moving, return_exceptions=True)
    finished = [answer for answer in answers if answer is not None]
    assert [answer.error for answer in finished if not answer.ok] == []
    stayed = [wish for number, wish in enumerate(asked) if number not in leaves]
    assert [len(a.tokens) for a in finished] == [wish.max_tokens for wish in stayed]
    return len(finished), begun


async def test_500_requests_of_which_150_are_left_alone_leave_no_kv_behind(hybrid: Server) -> None:
    before = hybrid.quiet(10)
    async with hybrid.client() as client:
        finished, begun = await all_of_them(client, seed=5)
        after = hybrid.quiet(2)
    assert finished == COUNT - CANCELLED
    counted = {name: after["requests"][name] - before["requests"][name] for name in before["requests"]}
    # A client that leaves before its request was read has asked for nothing.
    assert finished + begun <= counted["accepted"] <= COUNT
    assert counted["accepted"] == counted["finished"] + counted["cancelled"] + counted["failed"]
    assert (counted["finished"], counted["failed"]) == (finished, 0)
    assert after["moves"]["operator"] - before["moves"]["operator"] > 50
    assert [i["kv_tokens"] for i in after["instances"]] == [0, 0]
    assert [(i["decodes"], i["arriving"], i["queued_prefill_tokens"]) for i in after["instances"]] == [
        (0, 0, 0)
    ] * 2
