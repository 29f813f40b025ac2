"""What the server is told of prefix caches is what prompts find there: after evictions in a small KV, moves,
a reset, and the death of an instance.

The requests come one after the other, so each finds what was told before it came. Facts are in the event log.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from load import PATH, Wish, pusher, tokens_of_prefixes
from servers import Server, eventually, processes

from taichi_serve import eventlog
from taichi_serve.bench.client import stream
from taichi_serve.messages import Arrived, Cached, Lost, Prefilled, Tier

BLOCK = 32  # a CPU instance takes multiples of it
KV_BYTES = 3 << 20  # about 1,500 tokens
FLAGS = (
    *("--p-heavy", "1", "--d-heavy", "1", "--p-chunk", "256", "--d-chunk", "64", "--block-size", str(BLOCK)),
    *("--max-model-len", "1024", "--kv-cache-memory-bytes", str(KV_BYTES), "--enable-prompt-tokens-details"),
)
BACK_SECONDS = 90


class Prompts:
    """Conversations: the next prompt is one before it, and a little more."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.seen: list[list[int]] = [self._new(200)]

    def _new(self, tokens: int) -> list[int]:
        return [self.chance.randrange(300, 4000) for _ in range(tokens)]

    def next(self) -> list[int]:
        begun = self.chance.choice(self.seen[-6:])
        prompt = begun[: self.chance.randint(1, len(begun))] + self._new(self.chance.randint(0, 120))
        if len(prompt) > 800:
            prompt = prompt[:300]
        self.seen.append(prompt)
        return prompt


@dataclass
class Played:
    """What the log says: for each prompt the tokens that were known to be cached where it was computed, on
    the device or on its host, those that were found, and how many of them on the host."""

    known: list[int] = field(default_factory=list)
    found: list[int] = field(default_factory=list)
    loaded: list[int] = field(default_factory=list)
    removed: int = 0
    resets: int = 0


def played(log: Path) -> Played:
    """Go through a log from its beginning."""
    here, caches = Played(), dict[tuple[str, Tier], set[int]]()
    blocks: dict[str, tuple[int, ...]] = {}
    at_arrival: dict[str, dict[str, int]] = {}
    with log.open() as lines:
        for event, _ in eventlog.read(lines):
            match event:
                case Arrived(request=request, prompt_tokens=tokens):
                    blocks[request] = event.blocks
                    assert len(event.blocks) == tokens // BLOCK
                    at_arrival[request] = {
                        name: _run(event.blocks[: (tokens - 1) // BLOCK], _held(caches, name)) * BLOCK
                        for name, _ in caches
                    }
                case Cached(instance=name, tier=tier):
                    held = set() if event.reset else caches.get((name, tier), set())
                    assert held.isdisjoint(event.stored)
                    assert held | set(event.stored) >= set(event.removed)
                    caches[name, tier] = held.union(event.stored).difference(event.removed)
                    here.removed += len(event.removed)
                    here.resets += event.reset
                case Lost(instance=name):
                    caches |= {(name, tier): set() for tier in Tier}
                case Prefilled(request=request, instance=name):
                    here.known.append(at_arrival[request].get(name, 0))
                    here.found.append(event.cached)
                    here.loaded.append(event.loaded)
    return here


def _held(caches: dict[tuple[str, Tier], set[int]], name: str) -> set[int]:
    return set().union(*(caches.get((name, tier), set()) for tier in Tier))


def _run(blocks: tuple[int, ...], held: set[int]) -> int:
    return next((i for i, block in enumerate(blocks) if block not in held), len(blocks))


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    log = tmp_path_factory.mktemp("log") / "events.jsonl"
    server = Server(
        tmp_path_factory.mktemp("small"), *FLAGS, "--event-log", str(log), env={"VLLM_SERVER_DEV_MODE": "1"}
    )
    try:
        yield server.wait_ready(), log
    finally:
        server.end()


async def ask(client: httpx.AsyncClient, server: Server, prompt: list[int]) -> int:
    """Have it completed; how many of its tokens were cached, as the user is told."""
    body = Wish(prompt, 6).body()
    answer = await client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    server.quiet(10)
    usage: dict[str, Any] = answer.json()["usage"]
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def cached(server: Server) -> list[int]:
    """Blocks of every instance."""
    return [instance["cached_blocks"] for instance in server.state()["instances"]]


def is_back(server: Server) -> bool:
    """Whether i1 serves again."""
    instance = server.instance("i1")
    return bool(instance["alive"] and not instance["silent"] and instance["restarts"] == 1)


async def test_what_is_told_of_prefix_caches_is_what_prompts_find(small: tuple[Server, Path]) -> None:
    server, log = small
    prompts, usage = Prompts(seed=5), list[int]()
    async with server.client() as client:
        for _ in range(40):
            usage.append(await ask(client, server, prompts.next()))
        moved = Wish(prompts.next(), 150)
        await stream(client, PATH, moved.body(), pusher(client, [10, 60, 110]))
        server.quiet(10)
        usage.append(-1)  # a stream's usage is not looked at
        for _ in range(10):
            usage.append(await ask(client, server, prompts.next()))

        assert min(cached(server)) > 0
        assert (await client.post("/reset_prefix_cache")).status_code == 200
        eventually(lambda: cached(server) == [0, 0], 10, "that nothing is cached any more is known")
        again = prompts.seen[-1]
        usage += [await ask(client, server, again), await ask(client, server, again)]
        assert usage[-2] == 0

        processes(server, "i1")[0].kill()
        eventually(lambda: is_back(server), BACK_SECONDS, "i1 is back")
        for _ in range(10):
            usage.append(await ask(client, server, prompts.next()))
        counted = await tokens_of_prefixes(client)
    server.stop(logs_stay=True)

    here = played(log)
    assert here.known == here.found
    assert [one for one in usage if one >= 0] == [
        one for one, asked in zip(here.found, usage, strict=True) if asked >= 0
    ]
    assert counted == {"predicted": sum(here.known), "actual": sum(here.found)}
    assert sum(here.found) > 2000, "prompts found much"
    assert here.removed > 40, "and much was evicted"
    assert here.resets == 5  # two at the start, two by hand, one that came back
