"""Processes that stand still while KV is on its way, and what the streams say afterwards.

`benchmarks/stalls.py` runs every process, several times and both paths; test_stalls.py two of them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import psutil
from load import PATH, Wish, wishes
from servers import Server, until, workers

from taichi_serve.bench.client import Answer, stream

# One instance prefills and the other decodes, so every request moves; KV is scarce, so blocks are soon
# somebody else's.
FLAGS = ("--p-heavy", "1", "--d-heavy", "1", "--p-chunk", "256", "--d-chunk", "0", "--watermark", "1")
SCARCE = ("--kv-cache-memory-bytes", str(14 << 20), "--max-model-len", "2048")
WISHES = wishes(20, seed=77, prompt=(100, 1200), output=(80, 250))
VICTIMS = ("server", "source core", "source worker", "target core", "target worker")


@dataclass(frozen=True)
class Stalled:
    """What came of one stall: streams that differ from the undisturbed run, then and once more afterwards."""

    wrong: list[str]
    wrong_again: list[str]
    begun: int  # streams that had a token when it began
    longest_gap: float  # seconds between two tokens of a stream


def processes(server: Server, victim: str) -> list[psutil.Process]:
    """Those that stand still: the server's own, an engine core, or its workers."""
    if victim == "server":
        return [psutil.Process(server.process.pid)]
    end, part = victim.split()
    core = psutil.Process(server.instance("i0" if end == "source" else "i1")["pid"])
    return [core] if part == "core" else workers(core)


def wrong(answers: list[Answer], reference: list[list[int]]) -> list[str]:
    """What differs, in words."""
    return [
        f"{i}: {a.error or a.finish}, {len(a.tokens)} of {len(r)} tokens"
        for i, (a, r) in enumerate(zip(answers, reference, strict=True))
        if not a.ok or a.tokens != r
    ]


async def said(server: Server, wanted: list[Wish]) -> list[Answer]:
    """What the server says when nobody stands still."""
    async with server.client() as client:
        return await asyncio.gather(*(stream(client, PATH, wish.body()) for wish in wanted))


async def stall(server: Server, victim: str, seconds: float, reference: list[list[int]]) -> Stalled:
    """Stop a process while some streams have tokens and others none, and let it go on after so long."""
    begun: set[str] = set()

    async def note(answer: Answer) -> None:
        begun.add(answer.id)

    async def some() -> bool:
        return len(begun) >= 3

    async with server.client(timeout=seconds + 300) as client:
        tasks = [asyncio.create_task(stream(client, PATH, wish.body(), note)) for wish in WISHES]
        await until(some, 60, "three streams have begun")
        stopped, count = processes(server, victim), len(begun)
        for process in stopped:
            process.suspend()
        try:
            await asyncio.sleep(seconds)  # not a way to wait for anything: this is what is tried
        finally:
            for process in stopped:
                process.resume()
        answers = await asyncio.gather(*tasks)
    gap = max(
        (b - a for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)),
        default=0.0,
    )
    return Stalled(wrong(answers, reference), wrong(await said(server, WISHES), reference), count, gap)
