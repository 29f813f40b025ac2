"""What the requests of a workload have in common: how much of their prompts an infinite cache would have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from taichi_serve.cluster.simulated.job import Call


def turns(call: Call) -> Iterator[tuple[float, Call]]:
    """A call and all that follow it, with the time (s) of each if answers took no time."""
    at, following = 0.0, call
    while True:
        at += following.at
        yield at, following
        if following.then is None:
            return
        following = following.then


def requests(calls: Iterable[Call]) -> list[tuple[float, Call]]:
    """All turns of all calls, in order of time if answers took no time."""
    every = [turn for call in calls for turn in turns(call)]
    return sorted(every, key=lambda turn: turn[0])


@dataclass(frozen=True, slots=True)
class Seen:
    """A request, and how many tokens of its prompt an infinite cache has from all those before it."""

    call: Call
    tokens: int


def seen(calls: Iterable[Call], block_size: int) -> Iterator[Seen]:
    """Every request in order of time. As in an engine only full blocks count, the last token of a prompt is
    always computed, and the last token of an answer never is."""
    known: set[int] = set()
    for _, call in requests(calls):
        there, most = 0, (call.prompt_tokens - 1) // block_size
        for block in call.blocks[:most]:
            if block not in known:
                break
            there += 1
        known.update(call.blocks[: (call.prompt_tokens + call.output_tokens - 1) // block_size])
        yield Seen(call, there * block_size)


def shared(calls: Iterable[Call], block_size: int) -> float:
    """The share of all prompt tokens that an infinite cache has; 0.0 without calls."""
    each = list(seen(calls, block_size))
    total = sum(one.call.prompt_tokens for one in each)
    return sum(one.tokens for one in each) / total if total else 0.0
