"""Conversations on three instances with little KV say what they say undisturbed, token for token: while their
prefixes are fetched, they move, blocks are evicted, and the holder of prefixes is killed.

What happened is counted in the event log: a test that nothing happened in would prove nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from load import PATH, Wish, pusher, tokens_of_prefixes, wrong
from servers import Server, eventually, processes, until

from taichi_serve import eventlog
from taichi_serve.bench.client import Answer, stream
from taichi_serve.messages import Cached, Flowed, Lost, Prefill, Prefilled

LOG = logging.getLogger(__name__)
TALKS, TURNS = 16, 4
SYSTEMS = 4  # system prompts, each of so many tokens
SYSTEM_TOKENS = 256
NAMES = ("i0", "i1", "i2")
BLOCK = 32  # a CPU instance takes multiples of it
KV_TOKENS = 8192  # of an instance; the conversations have 16,000 tokens in the end, and moves leave copies
FLAGS = (
    *("--d-heavy", "3", "--d-chunk", "256", "--block-size", str(BLOCK), "--restarts", "0"),
    *("--kv-cache-memory-bytes", str(KV_TOKENS * 2048), "--move-timeout", "5"),
)


class Talks:
    """Conversations under way: what each has said so far, and its next message."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        systems = [_tokens(chance, SYSTEM_TOKENS) for _ in range(SYSTEMS)]
        self.said = [list(systems[number % SYSTEMS]) for number in range(TALKS)]
        self.messages = [
            [_tokens(chance, chance.randint(60, 200)) for _ in range(TURNS)] for _ in range(TALKS)
        ]

    def turn(self, number: int) -> list[Wish]:
        """The prompts of a turn of all conversations."""
        for said, messages in zip(self.said, self.messages, strict=True):
            said.extend(messages[number])
        return [Wish(list(said), 48) for said in self.said]

    def answered(self, answers: Sequence[Answer]) -> None:
        """The next turn goes on behind these."""
        for said, answer in zip(self.said, answers, strict=True):
            said.extend(answer.tokens)


def _tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(300, 4000) for _ in range(count)]


@dataclass
class Told:
    """What an event log says."""

    fetched: list[int] = field(default_factory=list)  # tokens, of each prompt that got some
    moves: int = 0  # that landed with KV
    removed: int = 0  # blocks
    lost: Counter[str] = field(default_factory=Counter)
    bereft: set[str] = field(default_factory=set)  # prompts that were to fetch from an instance as it died


def told(log: Path) -> Told:
    """Go through a log from its beginning."""
    here, asked = Told(), dict[str, str]()
    with log.open() as lines:
        for event, commands in eventlog.read(lines):
            match event:
                case Prefilled(request=request):
                    asked.pop(request, None)
                    here.fetched += [event.fetched] if event.fetched else []
                case Flowed():
                    here.moves += event.kv_tokens > 0
                case Cached():
                    here.removed += len(event.removed)
                case Lost(instance=name):
                    here.lost[name] += 1
                    here.bereft |= {request for request, holder in asked.items() if holder == name}
            asked |= {c.request: c.prefix_from for c in commands if isinstance(c, Prefill) and c.prefix_from}
    return here


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    log = tmp_path_factory.mktemp("log") / "events.jsonl"
    server = Server(tmp_path_factory.mktemp("talks"), *FLAGS, "--event-log", str(log))
    try:
        yield server.wait_ready(), log
    finally:
        server.end()


async def only_without(client: httpx.AsyncClient, name: str) -> None:
    """Prompts go to the others: whose prefix is on this one fetches it."""
    for other in NAMES:
        what = "drain" if other == name else "resume"
        (await client.post(f"/taichi/instances/{other}/{what}")).raise_for_status()


async def said(server: Server) -> list[list[Answer]]:
    """All turns, undisturbed."""
    talks, turns = Talks(seed=3), []
    async with server.client() as client:
        for number in range(TURNS):
            wishes = talks.turn(number)
            turns.append(await asyncio.gather(*(stream(client, PATH, wish.body()) for wish in wishes)))
            talks.answered(turns[-1])
    return turns


async def moved(client: httpx.AsyncClient, wishes: Sequence[Wish]) -> list[Answer]:
    """A turn in which every conversation is moved while it is answered."""
    asked = (stream(client, PATH, wish.body(), pusher(client, [8], NAMES)) for wish in wishes)
    return list(await asyncio.gather(*asked))


async def bereft(client: httpx.AsyncClient, server: Server, wishes: list[Wish]) -> list[Answer]:
    """A turn in which the holder i2 stands still while its prefixes are asked for, and is killed then."""
    before, holder = server.state()["requests"]["accepted"], processes(server, "i2")
    for process in holder:
        process.suspend()
    tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in wishes]

    async def placed() -> bool:
        state = (await client.get("/taichi/state")).json()
        return bool(state["requests"]["accepted"] == before + len(wishes))

    try:
        await until(placed, 10, "all are placed")
    finally:
        holder[0].kill()
        for process in holder:
            if process.is_running():
                process.resume()
    return list(await asyncio.gather(*tasks))


async def test_64_requests_of_conversations_say_what_they_say_undisturbed(
    single: Server, small: tuple[Server, Path]
) -> None:
    reference = await said(single)
    server, log = small
    talks, failures, counted = Talks(seed=3), list[str](), dict[str, float]()
    async with server.client() as client:
        for number, drained in enumerate(("", "i0", "i1", "i2")):
            await only_without(client, drained)
            wishes = talks.turn(number)
            if drained == "i2":
                counted = await tokens_of_prefixes(client)
                answers = await bereft(client, server, wishes)
            else:
                answers = await moved(client, wishes)
            failures += wrong(answers, reference[number])
            talks.answered(answers)
            server.quiet(20)
        eventually(lambda: not server.instance("i2")["alive"], 10, "its end is known")
        state = server.quiet(10)
    server.stop(logs_stay=True)
    assert failures == []
    assert (state["requests"]["finished"], state["requests"]["failed"]) == (TALKS * TURNS, 0)

    here = told(log)
    LOG.info("%s, %s; %d to the holder that died", counted, here, len(here.bereft))
    assert len(here.fetched) >= 8 and sum(here.fetched) >= 1000
    assert here.moves >= TALKS
    assert here.removed >= 100, "blocks were evicted"
    assert here.lost == {"i2": 1} and here.bereft, "prompts lost the holder of their prefix"
    assert counted["actual"] > 10_000
    assert abs(counted["predicted"] - counted["actual"]) <= 0.02 * counted["actual"]
