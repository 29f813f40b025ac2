"""Instances that are killed under load, each at a moment when it is surely in a chosen phase of a journey.

`test_kills.py` has every phase three times; `benchmarks/soak.py` goes on for as long as it is told.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from load import PATH, Wish
from servers import Server, until, workers

from taichi_serve.bench.client import Answer, stream

NAMES = ("i0", "i1", "i2")
# i0 prefills, long prompts in several chunks, whose KV travels ahead; the others decode.
THREE = ("--p-heavy", "1", "--d-heavy", "2", "--p-chunk", "256", "--d-chunk", "0", "--restarts", "100")
BACK_SECONDS = 60  # within which a killed instance takes requests again
TRIES = 400

Row = dict[str, Any]  # of an instance in /taichi/state
PHASES: dict[str, Callable[[Row], bool]] = {
    "prefilling": lambda row: row["stages"]["prefilling"] > 0,
    "copying ahead": lambda row: row["kv_coming"] + row["kv_leaving"] > 0,
    "leaving": lambda row: row["stages"]["leaving"] > 0,
    "landing": lambda row: row["stages"]["landing"] > 0,
    "decoding": lambda row: row["stages"]["decoding"] > 0,
}

# Who dies in which phase: P-heavy i0 is where prompts are computed and what KV comes from.
VICTIMS = {
    "prefilling": ("i0", "i0", "i0"),
    "copying ahead": ("i0", "i1", "i2"),
    "leaving": ("i1", "i2", "i1"),
    "landing": ("i2", "i1", "i2"),
    "decoding": ("i1", "i2", "i1"),
}


@dataclass
class Load:
    """So many streams at once, one after the other, each compared with what one instance says."""

    server: Server
    client: httpx.AsyncClient
    wishes: Sequence[Wish]
    reference: Sequence[list[int]]
    at_once: int = 5
    streams: int = 0
    wrong: list[str] = field(default_factory=list)
    live: dict[str, Answer] = field(default_factory=dict)
    stopping: bool = False

    async def lane(self, place: int, numbers: itertools.cycle[int]) -> None:
        """One stream after the other, until told to stop, or there are to be fewer."""
        while not self.stopping and place < self.at_once:
            number = next(numbers)
            answer = await stream(self.client, PATH, self.wishes[number].body(), self._note)
            self.live.pop(answer.id, None)
            self.streams += 1
            if not answer.ok or answer.tokens != self.reference[number]:
                self.wrong.append(f"{number}: {answer.error or answer.finish}, {len(answer.tokens)} tokens")

    async def _note(self, answer: Answer) -> None:
        self.live[answer.id] = answer

    async def push(self, names: Sequence[str]) -> None:
        """Ask every request to go to one of these instances; most can not at any given moment."""
        targets = itertools.cycle(names)
        asked = [
            self.client.post(f"/taichi/requests/{request}/flow", json={"to": next(targets)})
            for request in list(self.live)
        ]
        for answer in await asyncio.gather(*asked):
            assert answer.status_code in (202, 404, 409), answer.text


@asynccontextmanager
async def loaded(
    server: Server, wishes: Sequence[Wish], reference: Sequence[list[int]]
) -> AsyncIterator[Load]:
    """Load until the block is left; then every stream is seen to its end."""
    async with server.client() as client:
        load = Load(server, client, wishes, reference)
        numbers = itertools.cycle(range(len(wishes)))
        lanes = asyncio.gather(*(load.lane(place, numbers) for place in range(load.at_once)))
        try:
            yield load
        finally:
            load.stopping = True
            await lanes


async def kill(load: Load, name: str, phase: str) -> float:
    """Kill an instance in a phase; the seconds until it has taken a request again.

    It is stopped first and looked at then, so that what is looked at does not pass meanwhile.
    """
    server = load.server
    restarts = server.instance(name)["restarts"]
    for attempt in range(TRIES):
        if phase in ("leaving", "landing", "copying ahead"):
            others = [other for other in NAMES if other != name]
            await load.push(others if phase == "leaving" else [name])
        if await _killed_if(load, name, PHASES[phase], settle=attempt % 4):
            break
    else:
        raise AssertionError(f"{name} was not seen {phase} in {TRIES} tries")
    began, steps = time.monotonic(), server.instance(name)["steps"]
    load.at_once = 2  # those that run go on; an engine starts on the cores that they are computed on

    async def back() -> bool:
        row = server.instance(name)
        return bool(row["alive"] and row["restarts"] == restarts + 1 and row["steps"] > steps)

    try:
        await until(back, BACK_SECONDS, f"{name} is back and computes")
    except AssertionError as late:
        raise AssertionError(f"{late}: {server.instance(name)}\n{server.lines()[-8:]}") from None
    return time.monotonic() - began


async def _killed_if(load: Load, name: str, ready: Callable[[Row], bool], settle: int) -> bool:
    """Stop it, see whether it is as wished, and kill it or let it go on."""
    core = psutil.Process(load.server.instance(name)["pid"])
    parts = [core, *workers(core)]
    for _ in range(settle):  # other moments after the push
        await load.client.get("/health")
    for process in parts:
        process.suspend()
    await load.client.get("/taichi/state")  # what it said before is heard by now
    found = ready(load.server.instance(name))
    if found:
        core.kill()
    for process in parts:
        if process.is_running():
            process.resume()
    return found
