"""Send requests when they are due, whatever has become of the ones before; end when the outcome is certain.

Prompts are token ids drawn anew every time: the same ones twice would be answered from a prefix cache.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from taichi_serve.bench.client import Answer, stream
from taichi_serve.bench.endpoint import Endpoint, Instances
from taichi_serve.bench.score import Key, Live, Score
from taichi_serve.cluster.simulated.job import Call

PATH = "/v1/completions"
TOKENS = (300, 4000)  # ids that every vocabulary of some size has, and that are none of its special ones
LOOK = 0.2  # seconds between looks at what is late by now
Tell = Callable[[Score], None]


class OpenLoop:
    """The load on one server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._chance = random.Random()

    async def instances(self) -> Instances:
        """The server's instances as they are now."""
        return await self._endpoint.instances()

    async def run(
        self, calls: Sequence[Call], seed: int, score: Score, warm_up: int, early: bool, tell: Tell
    ) -> None:
        """Send all calls as soon as the server is idle; the first `warm_up` of them are not counted.

        Returns when every counted request is good or cannot be any more, or, with `early`, as soon as the
        target is kept or missed for certain. What is under way then is aborted by closing its connection.
        """
        await self._endpoint.settle()
        bodies = [self._body(call) for call in calls]
        began = time.perf_counter()
        tasks = {
            asyncio.create_task(
                self._one((seed, number), call, body, began, score if number >= warm_up else None)
            )
            for number, (call, body) in enumerate(zip(calls, bodies, strict=True))
        }
        todo = score.sent + len(calls) - warm_up
        pending = tasks
        try:
            while pending and not (early and score.kept is not None):
                if score.sent == todo and not score.open:
                    break
                done, pending = await asyncio.wait(pending, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                score.look(time.perf_counter())
                tell(score)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            score.give_up()

    async def _one(
        self, key: Key, call: Call, body: dict[str, Any], began: float, score: Score | None
    ) -> None:
        due = began + call.at
        await asyncio.sleep(due - time.perf_counter())
        if score is None:
            await stream(self._endpoint.client, PATH, body)
            return
        live = Live(due, call.prompt_tokens, call.output_tokens)
        score.begin(key, live, time.perf_counter())

        async def first(answer: Answer) -> None:
            live.answer = answer

        score.end(key, await stream(self._endpoint.client, PATH, body, first))

    def _body(self, call: Call) -> dict[str, Any]:
        """Exactly so many tokens in and out; the answer has token ids, as half a character has no text."""
        return {
            "model": self._endpoint.model,
            "prompt": [self._chance.randrange(*TOKENS) for _ in range(call.prompt_tokens)],
            "max_tokens": call.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
