"""Send requests when they are due, whatever has become of the ones before; end when the outcome is certain.

Only the next turn of a conversation waits: for the answer, and then for its user. Prompts are token ids that
no other run had: the same ones twice would be answered from a prefix cache.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from taichi_serve.bench.client import Answer, stream
from taichi_serve.bench.endpoint import Endpoint, EndpointError, Instances
from taichi_serve.bench.prompts import Prompts
from taichi_serve.bench.score import Live, Score
from taichi_serve.bench.sharing import requests
from taichi_serve.bench.workload import Workload
from taichi_serve.cluster.simulated.job import Call

PATH = "/v1/completions"
HEADER = "x-slo-ttft-ms", "x-slo-tpot-ms"
LOOK = 0.2  # seconds between looks at what is late by now
Tell = Callable[[Score], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one seed sends: the first `warm_up` requests are not counted."""

    seed: int
    calls: Sequence[Call]
    warm_up: int = 0
    block_size: int = 16

    @classmethod
    def of(cls, workload: Workload, rate: float, warm_up: int, counted: int, seed: int) -> Plan:
        """Of a workload at `rate` requests/s."""
        calls = tuple(workload.calls(rate, warm_up + counted, seed))
        return cls(seed, calls, warm_up, workload.block_size)

    @property
    def total(self) -> int:
        """All requests, turns that follow others with them."""
        return len(requests(self.calls))

    @property
    def span(self) -> float:
        """Seconds over which counted requests are sent, if answers took no time."""
        times = [at for at, _ in requests(self.calls)]
        return times[-1] - times[self.warm_up]


class OpenLoop:
    """The load on one server."""

    def __init__(self, endpoint: Endpoint, salt: int | None = None) -> None:
        """With a `salt` the runs have the same tokens as those of another load with that salt."""
        self._endpoint = endpoint
        self._salts = random.Random(salt)

    async def instances(self) -> Instances:
        """The server's instances as they are now."""
        return await self._endpoint.instances()

    async def run(self, plan: Plan, score: Score, early: bool, tell: Tell) -> None:
        """Send all calls as soon as the server is idle.

        Returns when every counted request is good or cannot be any more, or, with `early`, as soon as the
        target is kept or missed for certain. What is under way then is aborted by closing its connection.
        Raises EndpointError where the server does not return what a next turn needs.
        """
        await self._endpoint.settle()
        sending = _Sending(self._endpoint, plan, score, Prompts(self._salts.getrandbits(64), plan.block_size))
        todo = score.sent + plan.total - plan.warm_up
        tasks = pending = sending.start()
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
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            score.give_up()


class _Sending:
    """A plan under way."""

    def __init__(self, endpoint: Endpoint, plan: Plan, score: Score, prompts: Prompts) -> None:
        self._endpoint, self._plan, self._score, self._prompts = endpoint, plan, score, prompts
        self._sent = 0

    def start(self) -> set[asyncio.Task[None]]:
        """A task for each call and the turns that follow it. The prompts are made before any is sent."""
        made = [(call, self._prompts.first(call)) for call in self._plan.calls]
        began = time.perf_counter()
        return {asyncio.create_task(self._turns(call, prompt, began)) for call, prompt in made}

    async def _turns(self, call: Call, prompt: list[int], began: float) -> None:
        """One after the other, each as long after the answer before as it is to be."""
        due = began + call.at
        while True:
            answer = await self._one(due, call, prompt)
            if call.then is None:
                return
            if answer.ok and not answer.tokens:
                raise EndpointError(
                    f"{self._endpoint.client.base_url}: it does not return token ids (return_token_ids), and "
                    "the next turn of a conversation needs those of its answer"
                )
            due = time.perf_counter() + call.then.at
            prompt = self._prompts.following(prompt + answer.tokens, call, call.then)
            call = call.then

    async def _one(self, due: float, call: Call, prompt: list[int]) -> Answer:
        await asyncio.sleep(due - time.perf_counter())
        number = self._sent
        self._sent += 1
        body = self._body(call, prompt)
        if number < self._plan.warm_up:
            return await stream(self._endpoint.client, PATH, body, headers=_headers(call))
        key = self._plan.seed, number
        live = Live(due, call.prompt_tokens, call.output_tokens, slo=call.slo, slo_class=call.slo_class)
        self._score.begin(key, live, time.perf_counter())

        async def first(answer: Answer) -> None:
            live.answer = answer

        answer = await stream(self._endpoint.client, PATH, body, first, _headers(call))
        self._score.end(key, answer)
        return answer

    def _body(self, call: Call, prompt: list[int]) -> dict[str, Any]:
        """Exactly so many tokens out; the answer has token ids, as half a character has no text."""
        return {
            "model": self._endpoint.model,
            "prompt": prompt,
            "max_tokens": call.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }


def _headers(call: Call) -> dict[str, str]:
    """What tells the server of the request's own SLO. Its class has a name here that the server may not
    know."""
    if call.slo is None:
        return {}
    return {HEADER[0]: f"{call.slo.ttft * 1e3:.9g}", HEADER[1]: f"{call.slo.tpot * 1e3:.9g}"}
