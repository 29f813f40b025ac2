"""A document that a grammar holds to its form says the same wherever it was moved in the middle of it.

32 of them, of every kind of grammar and backend: schemas, choices, tools that must be called. Each is moved
three times at least, between instances that did not see it begin.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from documents import CHAT, HOLDS, KINDS, Document, documents
from load import instances_of, moves, push, pusher
from servers import Server

from taichi_serve.bench.client import Answer, stream

COUNT = 32
TIMES = 3  # moves of every one at least
ROUNDS = 8
DOCUMENTS = documents(COUNT, seed=3)


@dataclass(frozen=True)
class Said:
    """An answer that came in one piece."""

    tokens: list[int]
    message: Any  # text, or what a chat answers with, calls of tools among it
    finish: str


async def said(client: httpx.AsyncClient, document: Document, request_id: str | None = None) -> Said:
    """Ask for it in one piece; `request_id` is without the prefix that the server gives it."""
    headers = {"X-Request-Id": request_id} if request_id else {}
    answer = await client.post(document.path, json=document.body, headers=headers)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    message = choice.get("message") or choice["text"]
    for call in (message.get("tool_calls") or ()) if isinstance(message, dict) else ():
        call.pop("id")  # drawn by chance
    return Said(choice["token_ids"], message, choice["finish_reason"])


async def said_and_moved(client: httpx.AsyncClient, document: Document, name: str) -> tuple[Said, list[str]]:
    """Asked for in one piece, and moved as often as it lets itself be."""
    known = f"{'chatcmpl' if document.path == CHAT else 'cmpl'}-{name}"
    answer = asyncio.create_task(said(client, document, name))
    done = 0
    while not answer.done():
        if done < TIMES and await push(client, known):
            done += 1
        await asyncio.wait([answer], timeout=0.01)
    return answer.result(), await instances_of(client, known)


@pytest.fixture(scope="module")
def reference(single: Server) -> list[Said]:
    """What one instance says, undisturbed."""

    async def run() -> list[Said]:
        async with single.client() as client:
            return await asyncio.gather(*(said(client, document) for document in DOCUMENTS))

    return asyncio.run(run())


def parts(document: Document, one: Said) -> list[str]:
    """The texts that are to have the form: of a chat the arguments of each call, or what it says."""
    if not isinstance(one.message, dict):
        return [one.message]
    calls = one.message.get("tool_calls")
    if document.kind not in ("required", "named"):
        assert not calls
        return [one.message["content"]]
    functions = [call["function"] for call in calls]
    assert document.kind == "required" or [function["name"] for function in functions] == ["print"]
    return [function["arguments"] for function in functions]


def test_what_ends_by_itself_has_the_form_that_was_asked_for(reference: list[Said]) -> None:
    """Else the others would show nothing."""
    ended: Counter[str] = Counter()
    for document, one in zip(DOCUMENTS, reference, strict=True):
        if one.finish != "length":
            ended[document.kind] += 1
            for text in parts(document, one):
                assert HOLDS.get(document.kind, HOLDS["json"])(text), (document.kind, text)
    assert len(ended) >= len(KINDS) - 3, ended


async def streamed(
    client: httpx.AsyncClient, document: Document, chance: random.Random, at_once: bool
) -> tuple[Answer, list[str]]:
    """Streamed, and moved at tokens of chance within the first third, or `at_once`: as soon as it can be."""
    steps = [1] * TIMES if at_once else chance.sample(range(1, 40), TIMES)
    answer = await stream(client, document.path, document.body, pusher(client, steps))
    return answer, await instances_of(client, answer.id) if answer.id else []


async def all_moved(server: Server, reference: list[Said]) -> None:
    """Every one moves, three times in one go; each answer on the way is right."""
    todo = list(range(COUNT))
    chance = random.Random(9)
    async with server.client() as client:
        for number in range(ROUNDS):
            asked = [streamed(client, DOCUMENTS[i], chance, number > 0) for i in todo]
            results = await asyncio.gather(*asked)
            wrong = [
                (DOCUMENTS[i].kind, answer.error or answer.finish, legs)
                for i, (answer, legs) in zip(todo, results, strict=True)
                if not answer.ok or answer.tokens != reference[i].tokens
            ]
            assert wrong == []
            todo = [i for i, (_, legs) in zip(todo, results, strict=True) if moves(legs) < TIMES]
            if not todo:
                break
    assert [DOCUMENTS[i].kind for i in todo] == [], f"were not moved {TIMES} times"
    state = server.quiet()
    assert state["requests"]["failed"] == 0
    assert "structured_outputs" not in state["bound"]


async def test_32_of_32_documents_moved_three_times_say_what_one_instance_says(
    hybrid: Server, reference: list[Said]
) -> None:
    await all_moved(hybrid, reference)


async def test_the_same_where_each_is_handed_over_after_its_first_token(
    disaggregation: Server, reference: list[Said]
) -> None:
    before = disaggregation.state()["moves"]["hand-over"]
    await all_moved(disaggregation, reference)
    assert disaggregation.state()["moves"]["hand-over"] - before >= COUNT


async def test_in_one_piece_they_are_the_same_with_their_calls_of_tools(
    hybrid: Server, reference: list[Said]
) -> None:
    async with hybrid.client() as client:
        for number in range(ROUNDS):
            results = await asyncio.gather(
                *(said_and_moved(client, one, f"{number}-{i}") for i, one in enumerate(DOCUMENTS))
            )
            wrong = [i for i, (one, _) in enumerate(results) if one != reference[i]]
            assert wrong == [], [(DOCUMENTS[i], results[i]) for i in wrong]
            if sum(moves(legs) for _, legs in results) >= COUNT * 2:
                break
    assert sum(moves(legs) for _, legs in results) >= COUNT * 2


async def test_a_grammar_that_nobody_can_build_is_refused_and_the_server_goes_on(hybrid: Server) -> None:
    bad = {"model": "tiny", "prompt": [300], "structured_outputs": {"json": {"type": "no such type"}}}
    async with hybrid.client() as client:
        answer = await client.post("/v1/completions", json=bad)
        assert answer.status_code == 400
        assert "error" in json.loads(answer.text)
        assert (await said(client, DOCUMENTS[2])).tokens
