"""docs/moving.md line by line: what moves says the same as unmoved, and what could not stays where it is."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from load import Whole, Wish, completed, completed_and_moved, moves, until_known
from servers import Server

DOCUMENT = Path(__file__).parents[2] / "docs" / "moving.md"
LINE = re.compile(r"^\| `(?P<name>\w+)` \| (?P<cpu>moves|stays)\b")
TABLE = {m["name"]: m["cpu"] for line in DOCUMENT.read_text().splitlines() if (m := LINE.match(line))}

CHANCE = random.Random(7)
PROMPTS = [[CHANCE.randrange(300, 4000) for _ in range(90)] for _ in range(8)]
OUTPUT = 150
# So that the tiny model does not fall into a rut: its output goes on to say new things.
LIVELY = {"repetition_penalty": 1.2}
Body = dict[str, Any]


def late_token(plain: Whole) -> int:
    """A token that is new when two thirds of the output are there."""
    tokens = plain.tokens
    return next(t for i, t in enumerate(tokens) if i >= OUTPUT * 2 // 3 and t not in tokens[:i])


def late_text(plain: Whole) -> str:
    """A piece of text that is new when two thirds of the output are there."""
    text = plain.text
    pieces = ((start, text[start : start + 5]) for start in range(len(text) * 2 // 3, len(text) - 10))
    return next(piece for start, piece in pieces if text.index(piece) == start and "\ufffd" not in piece)


# What each line of the table asks for, given what the plain request says.
MOVED: dict[str, Callable[[Whole], Body]] = {
    "temperature_0": lambda plain: {},
    "stop": lambda plain: {"stop": [late_text(plain)], "include_stop_str_in_output": True},
    "stop_token_ids": lambda plain: {"stop_token_ids": [late_token(plain)]},
    "min_tokens": lambda plain: {"min_tokens": 120, "stop_token_ids": [plain.tokens[20]]},
    "logprobs": lambda plain: {"logprobs": 3},
    "repetition_penalty": lambda plain: {"repetition_penalty": 1.5},
    "logit_bias": lambda plain: {
        "logit_bias": {str(t): -100 for t, _ in Counter(plain.tokens).most_common(5)}
    },
    "allowed_token_ids": lambda plain: {"allowed_token_ids": list(range(300, 800))},
    # Greedy requests may not ask for more than one: drawn from the one best token it is the same.
    "n": lambda plain: {"n": 2, "temperature": 1.0, "top_k": 1},
    "echo": lambda plain: {"echo": True},
    # test_structured.py has every kind of grammar.
    "structured_outputs": lambda plain: {"structured_outputs": {"regex": "[a-z]{400}"}},
}
BOUND: dict[str, Body] = {
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 0.7},
    "seed": {"seed": 11, "temperature": 0.9},
    "bad_words": {"bad_words": ["the", "日"]},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "repetition_detection": {"repetition_detection": {"max_pattern_size": 8, "min_count": 100}},
    "logits_processors": {"vllm_xargs": {"of_a_custom_processor": 1}},
}
# Not to be had from this model with these flags: test_exact.py shows that they are seen.
UNREACHABLE = {
    "lm_format_enforcer",
    "watermarking",
    "thinking_token_budget",
    "trace_decode_token_ids",
    "pooling",
    "multimodal",
    "prompt_embeds",
    "streaming_input",
}
# Sampled without a seed there is nothing to compare with.
UNREPEATABLE = {"temperature"}


@dataclass(frozen=True)
class Plain:
    """A request without any parameter, and what one instance says to it."""

    wish: Wish
    whole: Whole


@pytest.fixture(scope="module")
def plain(single: Server) -> Plain:
    """The one of several whose output says something new for the longest time."""

    async def run() -> list[Plain]:
        async with single.client() as client:
            asked = [Wish(prompt, OUTPUT) for prompt in PROMPTS]
            return [Plain(w, a) for w, a in zip(asked, await together(client, asked), strict=True)]

    async def together(client: httpx.AsyncClient, asked: list[Wish]) -> list[Whole]:
        return await asyncio.gather(*(completed(client, wish.body(**LIVELY)) for wish in asked))

    return max(asyncio.run(run()), key=lambda plain: len(set(plain.whole.tokens)))


def test_every_line_of_the_table_has_a_test() -> None:
    stays = {name for name, cpu in TABLE.items() if cpu == "stays"}
    assert stays == BOUND.keys() | UNREACHABLE
    assert TABLE.keys() - stays == MOVED.keys() | UNREPEATABLE


def near(one: Any, other: Any) -> bool:
    """Equal, but for numbers, which may be as far apart as sums in another order are."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(near(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(near, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-3
    return bool(one == other)


@pytest.mark.parametrize("name", MOVED)
async def test_what_moves_says_the_same_as_unmoved(
    name: str, hybrid: Server, single: Server, plain: Plain
) -> None:
    body = plain.wish.body(**LIVELY | MOVED[name](plain.whole))
    async with single.client() as client:
        unmoved = await completed(client, body)
    async with hybrid.client() as client:
        for attempt in range(5):  # a short one may be over before its second move
            moved, legs = await completed_and_moved(client, body, f"cmpl-moved-{name}-{attempt}")
            assert near(moved.choices, unmoved.choices)
            if moves(legs) >= 2:
                break
    assert moves(legs) >= 2, legs
    if name not in ("temperature_0", "logprobs", "n", "echo"):
        assert unmoved.tokens != plain.whole.tokens, "the parameter made no difference: this shows nothing"


async def test_sampling_without_a_seed_moves_and_brings_every_token(hybrid: Server) -> None:
    body = Wish(PROMPTS[0], OUTPUT).body(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01)
    async with hybrid.client() as client:
        moved, legs = await completed_and_moved(client, body, "cmpl-moved-temperature")
    assert moves(legs) >= 2
    assert len(moved.tokens) == OUTPUT


@pytest.mark.parametrize("name", BOUND)
async def test_what_cannot_move_exactly_stays_is_counted_and_says_the_same(
    name: str, hybrid: Server, single: Server
) -> None:
    body = Wish(PROMPTS[0], OUTPUT).body(**BOUND[name])
    before = hybrid.state()["bound"].get(name, 0)
    async with single.client() as client:
        alone = await completed(client, body)
    async with hybrid.client() as client:
        request_id = f"cmpl-bound-{name}"
        answer = asyncio.create_task(completed(client, body, request_id))
        await until_known(client, request_id)
        for to in ("i0", "i1"):
            refusal = await client.post(f"/taichi/requests/{request_id}/flow", json={"to": to})
            assert refusal.status_code == 409
            assert "bound to its instance" in refusal.json()["error"]["message"]
        here = await answer
        legs = (await client.get(f"/taichi/requests/{request_id}")).json()["requests"][0]["legs"]
    assert hybrid.state()["bound"][name] == before + 1
    assert len(legs) == 1
    assert near(here.choices, alone.choices)
