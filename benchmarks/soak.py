"""Load for minutes while instances are killed, one after the other: every stream is right, each instance
comes back, and nothing grows.

    python benchmarks/soak.py [--minutes 10] [--every 60] [-- FLAGS OF TAICHI SERVE]

Three instances with the tiny model. Every so many seconds one gets SIGKILL, each time in another phase: while
it prefills, while KV comes to it, while a request is about to leave it, while it decodes. Streams are
compared with what one instance says. The server is counted after the first instance has come back and at
the end.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from footprint import SLACK, of_process, shared_memory
from load import PATH, wishes
from servers import Server, eventually, until

from taichi_serve.bench.client import Answer, stream

THREE = ("--p-heavy", "1", "--d-heavy", "2", "--p-chunk", "256", "--d-chunk", "64", "--restarts", "100")
WISHES = wishes(24, seed=5, prompt=(100, 1500), output=(60, 250))
AT_ONCE = 8
BACK_SECONDS = 60

Ready = Callable[[dict[str, Any]], bool]
# When a victim is in a phase, by its own row of /taichi/state.
PHASES: dict[str, Ready] = {
    "prefilling": lambda row: row["queued_prefill_tokens"] > 200,
    "landing": lambda row: row["arriving"] > 0,
    "leaving": lambda row: row["decodes"] > 0,
    "decoding": lambda row: row["decodes"] > 1,
}


@dataclass
class Soak:
    """One server under load, and what was seen."""

    server: Server
    reference: list[list[int]]
    streams: int = 0
    wrong: list[str] = field(default_factory=list)
    live: dict[str, Answer] = field(default_factory=dict)
    stopping: bool = False

    async def load(self, client: httpx.AsyncClient) -> None:
        """So many streams at once, until told to stop."""
        numbers = itertools.cycle(range(len(WISHES)))

        async def lane() -> None:
            while not self.stopping:
                await self.one(client, next(numbers))

        await asyncio.gather(*(lane() for _ in range(AT_ONCE)))

    async def one(self, client: httpx.AsyncClient, number: int) -> None:
        """One stream, compared."""

        async def note(answer: Answer) -> None:
            self.live[answer.id] = answer

        answer = await stream(client, PATH, WISHES[number].body(), note)
        self.live.pop(answer.id, None)
        self.streams += 1
        if not answer.ok or answer.tokens != self.reference[number]:
            self.wrong.append(f"{number}: {answer.error or answer.finish}, {len(answer.tokens)} tokens")

    async def kill(self, client: httpx.AsyncClient, name: str, phase: str) -> str:
        """Kill an instance in a phase, and wait until it is back; one line about it."""
        restarts = self.server.instance(name)["restarts"]
        seen = await self._in(name, phase)
        if phase == "leaving":
            await self._push_from(client, name)
        psutil.Process(self.server.instance(name)["pid"]).kill()
        began = time.monotonic()

        async def back() -> bool:
            row = self.server.instance(name)
            return bool(row["alive"] and row["restarts"] == restarts + 1)

        await until(back, 3 * BACK_SECONDS, f"{name} is back")
        when = phase if seen else f"{phase} (not seen)"
        return f"{name} while {when}: back after {time.monotonic() - began:.0f} s"

    async def _in(self, name: str, phase: str) -> bool:
        try:
            await until(lambda: self._ready(name, phase), 20, phase)
        except AssertionError:
            return False
        return True

    async def _ready(self, name: str, phase: str) -> bool:
        return PHASES[phase](self.server.instance(name))

    async def _push_from(self, client: httpx.AsyncClient, name: str) -> None:
        to = next(n for n in ("i0", "i1", "i2") if n != name)
        posts: list[Awaitable[Any]] = [
            client.post(f"/taichi/requests/{request}/flow", json={"to": to}) for request in list(self.live)
        ]
        await asyncio.gather(*posts)


def held(server: Server) -> dict[str, int]:
    """What the server's own process holds, and what lies about, when it is idle."""
    process = psutil.Process(server.process.pid)

    def alone() -> bool:
        return not [c for c in process.net_connections("tcp") if c.laddr.port == server.port and c.raddr]

    server.quiet(60)
    eventually(alone, 30, "no client is connected")
    found = of_process(server.process.pid)
    family = {p.pid for p in server.family()}
    return {
        **{what: found[what] for what in ("descriptors", "sockets", "threads", "mappings", "rss")},
        "processes": len(family),
        "shared": len(shared_memory(family)[0]),
    }


async def soak(server: Server, reference: list[list[int]], args: argparse.Namespace) -> int:
    """All kills; the exit status."""
    here = Soak(server, reference)
    before: dict[str, int] = {}
    end = time.monotonic() + args.minutes * 60
    victims = itertools.product(PHASES, ("i1", "i0", "i2"))
    for phase, name in itertools.cycle(victims):
        if time.monotonic() > end:
            break
        started = time.monotonic()
        async with server.client() as client:
            here.stopping = False
            loading = asyncio.create_task(here.load(client))
            print(await here.kill(client, name, phase), flush=True)
            await asyncio.sleep(max(0.0, args.every - (time.monotonic() - started)))  # the load's own time
            here.stopping = True
            await loading
        after = held(server)
        before = before or after
        print("  " + ", ".join(f"{what} {count}" for what, count in after.items()), flush=True)
    return verdict(here, before, after, server.state()["requests"])


def verdict(here: Soak, before: dict[str, int], after: dict[str, int], requests: dict[str, int]) -> int:
    """Print what was found; 1 where something is wrong."""
    ended = sum(requests[how] for how in ("finished", "cancelled", "failed"))
    grown = {
        w: (before[w], after[w]) for w in before if w != "rss" and after[w] > before[w] + SLACK.get(w, 0)
    }
    print(f"{here.streams} streams, wrong: {here.wrong or 'none'}")
    print(
        f"requests: {requests}; accepted and ended {'agree' if requests['accepted'] == ended else 'DIFFER'}"
    )
    print(
        f"grown: {grown or 'nothing'}; memory of the server {before['rss'] >> 20} -> {after['rss'] >> 20} MiB"
    )
    return int(bool(here.wrong or grown or requests["accepted"] != ended))


def main() -> int:
    """The command."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=60, help="seconds between two kills, and no less")
    parser.add_argument("flags", nargs="*", help="of taichi serve, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        single = Server(Path(directory) / "one", "--d-heavy", "1")
        server = Server(Path(directory) / "three", *THREE, *args.flags)
        try:
            reference = asyncio.run(undisturbed(single.wait_ready()))
            single.end()
            return asyncio.run(soak(server.wait_ready(), reference, args))
        finally:
            single.end()
            server.end()


async def undisturbed(single: Server) -> list[list[int]]:
    """What one instance says."""
    async with single.client() as client:
        answers = await asyncio.gather(*(stream(client, PATH, wish.body()) for wish in WISHES))
    return [answer.tokens for answer in answers]


if __name__ == "__main__":
    sys.exit(main())
