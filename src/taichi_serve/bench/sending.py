"""Requests on their way: each is sent when it is due, and what becomes of it is told to whoever counts.

It runs in the process that measures, or in several beside it (sender.py), and is the same in both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from taichi_serve.bench.client import Answer, stream
from taichi_serve.bench.endpoint import Endpoint, EndpointError
from taichi_serve.bench.prompts import Prompts
from taichi_serve.bench.score import Live
from taichi_serve.cluster.simulated.job import Call

PATH = "/v1/completions"
HEADER = "x-slo-ttft-ms", "x-slo-tpot-ms"
Which = tuple[int, int]  # the place of a call in its plan, and which turn of its conversation


class Heard(Protocol):
    """Who is told of requests; times are `time.perf_counter()` seconds."""

    def waits(self, which: Which, due: float) -> None:
        """It will be sent then."""

    def begun(self, which: Which, live: Live, now: float) -> None:
        """It is sent; `live` gets its answer with the first token."""

    def ended(self, which: Which, live: Live, answer: Answer) -> None:
        """Its answer is over, however."""


@dataclass(frozen=True, slots=True)
class First:
    """A request that follows no other."""

    place: int  # in its plan
    call: Call
    prompt: list[int]


class Sending:
    """Requests under way."""

    def __init__(self, endpoint: Endpoint, prompts: Prompts, heard: Heard) -> None:
        self._endpoint, self._prompts, self._heard = endpoint, prompts, heard

    def start(self, firsts: Iterable[First], began: float) -> set[asyncio.Task[None]]:
        """A task for each request and the turns that follow it; times of calls count from `began`."""
        return {asyncio.create_task(self._turns(first, began)) for first in firsts}

    async def _turns(self, first: First, began: float) -> None:
        """One after the other, each as long after the answer before as it is to be."""
        call, prompt, due, turn = first.call, first.prompt, began + first.call.at, 0
        while True:
            answer = await self._one((first.place, turn), due, call, prompt)
            if call.then is None:
                return
            if answer.ok and not answer.tokens:
                raise EndpointError(
                    f"{self._endpoint.client.base_url}: it does not return token ids (return_token_ids), and "
                    "the next turn of a conversation needs those of its answer"
                )
            due, turn = time.perf_counter() + call.then.at, turn + 1
            prompt = self._prompts.following(prompt + answer.tokens, call, call.then)
            call = call.then

    async def _one(self, which: Which, due: float, call: Call, prompt: list[int]) -> Answer:
        self._heard.waits(which, due)
        await asyncio.sleep(due - time.perf_counter())
        live = Live(due, call.prompt_tokens, call.output_tokens, slo=call.slo, slo_class=call.slo_class)
        body = self._body(call, prompt)
        self._heard.begun(which, live, time.perf_counter())

        async def first(answer: Answer) -> None:
            live.answer = answer

        answer = await stream(self._endpoint.client, PATH, body, first, _headers(call))
        self._heard.ended(which, live, answer)
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
