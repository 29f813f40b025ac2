"""Requests for the integration tests: seeded prompts, streams that move as they run, and what came back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import httpx
from servers import until
from tokenizers import Tokenizer

from taichi_serve.bench.client import Answer, stream
from taichi_serve.tiny import SCRIPTS, cached_tiny_model

PATH = "/v1/completions"
Prompt = str | list[int]


@dataclass(frozen=True)
class Wish:
    """One completion that a test asks for."""

    prompt: Prompt
    max_tokens: int

    def body(self, **more: Any) -> dict[str, Any]:
        """Greedy, to the last token, with token ids in the answer."""
        return {
            "model": "tiny",
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **more,
        }


@cache
def tokenizer() -> Tokenizer:
    """The tiny model's."""
    return Tokenizer.from_file(str(cached_tiny_model() / "tokenizer.json"))


def text_of(tokens: int, chance: random.Random) -> str:
    """Text in several scripts, most of its characters of several bytes, of at most so many tokens."""
    words: list[str] = []
    size = 0
    while True:
        word = "".join(chance.choices(chance.choice(SCRIPTS).split(), k=chance.randint(1, 3))) + " "
        size += len(tokenizer().encode(word).ids)
        if size > tokens and words:
            return "".join(words)
        words.append(word)


def wishes(
    count: int, seed: int, prompt: tuple[int, int] = (16, 1500), output: tuple[int, int] = (32, 256)
) -> list[Wish]:
    """Requests with lengths between the bounds; every other prompt is multi-byte text."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        size = chance.randint(*prompt)
        ids: Prompt = [chance.randrange(300, 4000) for _ in range(size)]
        made.append(Wish(text_of(size, chance) if number % 2 else ids, chance.randint(*output)))
    return made


async def view(client: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    """What the server remembers of a request with one prompt and one choice."""
    answer = await client.get(f"/taichi/requests/{request_id}")
    answer.raise_for_status()
    return answer.json()["requests"][0]


async def instances_of(client: httpx.AsyncClient, request_id: str) -> list[str]:
    """The instance of every leg so far."""
    return [leg["instance"] for leg in (await view(client, request_id))["legs"]]


async def tokens_of_prefixes(client: httpx.AsyncClient) -> dict[str, float]:
    """What /metrics says of all instances: predicted and actual."""
    lines = (await client.get("/metrics")).text.splitlines()
    sums = {"predicted": 0.0, "actual": 0.0}
    for line in lines:
        if line.startswith("taichi_prefix_tokens_total{"):
            of = line.split('of="')[1].split('"')[0]
            sums[of] += float(line.rsplit(" ", 1)[1])
    return sums


def moves(instances: Sequence[str]) -> int:
    """How often a request changed instance."""
    return sum(a != b for a, b in pairwise(instances))


async def push(client: httpx.AsyncClient, request_id: str, names: Sequence[str] = ("i0", "i1")) -> bool:
    """Ask for a move to the next instance; False when that is not possible at this moment."""
    try:
        at = (await instances_of(client, request_id))[-1]
    except (IndexError, httpx.HTTPStatusError):
        return False  # nothing of it is out yet
    to = names[(names.index(at) + 1) % len(names)]
    answer = await client.post(f"/taichi/requests/{request_id}/flow", json={"to": to})
    assert answer.status_code in (202, 409), answer.text
    return answer.status_code == 202


def pusher(
    client: httpx.AsyncClient, steps: Iterable[int], names: Sequence[str] = ("i0", "i1")
) -> Callable[[Answer], Awaitable[None]]:
    """For `stream`: move the request when it has got to each of these tokens; ask until it goes."""
    todo = sorted(steps)
    at = ""

    async def on_tokens(answer: Answer) -> None:
        nonlocal at
        if not todo or len(answer.tokens) < todo[0]:
            return
        at = at or (await instances_of(client, answer.id) or [""])[-1]
        if not at:
            return
        to = names[(names.index(at) + 1) % len(names)]
        asked = await client.post(f"/taichi/requests/{answer.id}/flow", json={"to": to})
        assert asked.status_code in (202, 409), asked.text
        if asked.status_code == 202:
            todo.pop(0)
            at = to

    return on_tokens


async def streamed(client: httpx.AsyncClient, asked: Sequence[Wish], **more: Any) -> list[Answer]:
    """All at once, streaming."""
    return await asyncio.gather(*(stream(client, PATH, wish.body(**more)) for wish in asked))


async def streamed_and_moved(
    client: httpx.AsyncClient, asked: Sequence[Wish], seed: int, times: int = 3, at_once: bool = False
) -> list[tuple[Answer, list[str]]]:
    """All at once, streaming, each moved `times` times; with its legs' instances.

    They move at random tokens, or `at_once`: from the first token on, as soon as they can.
    """
    chance = random.Random(seed)

    async def one(wish: Wish, steps: list[int]) -> tuple[Answer, list[str]]:
        answer = await stream(client, PATH, wish.body(), pusher(client, steps))
        return answer, await instances_of(client, answer.id) if answer.id else []

    # The later a move is asked for, the likelier the last token is out before it: the end is left alone.
    plans = [
        [1] * times if at_once else chance.sample(range(1, max(times + 1, wish.max_tokens // 2)), times)
        for wish in asked
    ]
    return await asyncio.gather(*(one(wish, plan) for wish, plan in zip(asked, plans, strict=True)))


@dataclass(frozen=True)
class Whole:
    """A completion that was not streamed."""

    tokens: list[int]
    text: str
    finish: str
    choices: list[dict[str, Any]]


async def completed(client: httpx.AsyncClient, body: dict[str, Any], request_id: str | None = None) -> Whole:
    """One completion without streaming; `request_id` is how the server will know it (cmpl-...)."""
    headers = {"X-Request-Id": request_id.removeprefix("cmpl-")} if request_id else {}
    answer = await client.post(PATH, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    first = choices[0]
    return Whole(first["token_ids"], first["text"], first["finish_reason"], choices)


async def completed_and_moved(
    client: httpx.AsyncClient, body: dict[str, Any], request_id: str, times: int = 3
) -> tuple[Whole, list[str]]:
    """One completion without streaming, moved as often as it lets itself be, and its legs' instances."""
    answer = asyncio.create_task(completed(client, body, request_id))
    done = 0
    while not answer.done():
        if done < times and await push(client, request_id):
            done += 1
        await asyncio.wait([answer], timeout=0.01)
    return answer.result(), await instances_of(client, request_id)


async def until_known(client: httpx.AsyncClient, request_id: str) -> None:
    """Wait until the server knows a request by its id."""

    async def known() -> bool:
        return (await client.get(f"/taichi/requests/{request_id}")).status_code == 200

    await until(known, 30, f"{request_id} is known")


def wrong(answers: list[Answer], reference: list[Answer]) -> list[str]:
    """What differs from the reference, in words."""
    return [
        f"{i}: {a.error or a.finish}, {len(a.tokens)} of {len(r.tokens)} tokens"
        for i, (a, r) in enumerate(zip(answers, reference, strict=True))
        if not a.ok or a.tokens != r.tokens or a.text != r.text
    ]
