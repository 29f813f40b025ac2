"""Wherever a request goes while it generates, its user gets what one instance alone would have said.

64 greedy streams in float32, prompts of 16 to 1500 tokens, outputs of 32 to 256; every other one text in
characters of several bytes.
"""

from __future__ import annotations

import asyncio

import pytest
from load import Whole, completed_and_moved, moves, streamed, streamed_and_moved, wishes
from servers import Server

from taichi_serve.bench.client import Answer

WISHES = wishes(64, seed=1)
TIMES = 3  # moves of every request at least
MANY = 8  # moves asked of every request between a P-heavy and a D-heavy instance, until there were so many:
TOTAL = 500
ROUNDS = 6


def same(answer: Answer | Whole, reference: Answer) -> bool:
    return answer.tokens == reference.tokens and answer.text == reference.text


@pytest.fixture(scope="module")
def reference(single: Server) -> list[Answer]:
    """The 64, from one instance."""

    async def run() -> list[Answer]:
        async with single.client() as client:
            return await streamed(client, WISHES)

    answers = asyncio.run(run())
    assert [answer.error for answer in answers if not answer.ok] == []
    assert [len(a.tokens) for a in answers] == [w.max_tokens for w in WISHES]
    assert (
        sum(single.state()["moves"][kind] for kind in ("hand-over", "degrade", "backflow", "operator")) == 0
    )
    return answers


async def all_moved(server: Server, reference: list[Answer], asked: int = TIMES, total: int = 0) -> None:
    """Run the 64 until each one has really made its moves, and there were `total`; every answer on the way
    must be the right one."""
    todo = list(range(len(WISHES)))
    async with server.client() as client:
        for number in range(ROUNDS):
            these = [WISHES[i] for i in todo]
            # A short one may be over before its third move: it gets another chance, and less time to lose.
            results = await streamed_and_moved(client, these, seed=number, times=asked, at_once=number > 0)
            wrong = [
                i for i, (a, _) in zip(todo, results, strict=True) if not (a.ok and same(a, reference[i]))
            ]
            assert wrong == [], [results[todo.index(i)][1] for i in wrong]
            todo = [i for i, (_, legs) in zip(todo, results, strict=True) if moves(legs) < TIMES]
            if not todo and server.state()["moves"]["operator"] >= total:
                break
            todo = todo or list(range(len(WISHES)))
        else:
            raise AssertionError(
                f"{todo} were not moved {TIMES} times, or all {total} times, in {ROUNDS} rounds"
            )
    state = server.quiet()
    assert state["requests"]["failed"] == 0
    assert state["moves"]["operator"] >= max(total, len(WISHES))


async def test_64_of_64_streams_that_moved_500_times_say_what_one_instance_says(
    hybrid: Server, reference: list[Answer]
) -> None:
    await all_moved(hybrid, reference, MANY, TOTAL)


async def test_the_same_between_two_equal_instances(aggregation: Server, reference: list[Answer]) -> None:
    await all_moved(aggregation, reference)


async def test_the_same_where_one_instance_prefills_and_the_other_decodes(
    disaggregation: Server, reference: list[Answer]
) -> None:
    await all_moved(disaggregation, reference)


async def test_what_is_not_streamed_is_the_same_text(hybrid: Server, reference: list[Answer]) -> None:
    moved = 0
    async with hybrid.client() as client:
        # How often one lets itself be moved before it is over is a matter of speed: a few rounds.
        for number in range(ROUNDS):
            results = await asyncio.gather(
                *(
                    completed_and_moved(client, wish.body(), f"cmpl-whole-{number}-{i}", TIMES)
                    for i, wish in enumerate(WISHES)
                )
            )
            assert [i for i, (whole, _) in enumerate(results) if not same(whole, reference[i])] == []
            moved += sum(moves(legs) for _, legs in results)
            if moved >= len(WISHES):
                break
    assert moved >= len(WISHES)
