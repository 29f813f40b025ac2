"""Load for minutes while instances are killed, one after the other: every stream is right, each instance
comes back, and nothing grows.

    python benchmarks/soak.py [--minutes 10] [--every 60] [-- FLAGS OF TAICHI SERVE]

Three instances with the tiny model. Every so many seconds one gets SIGKILL, in one phase after the other:
while it prefills, copies ahead, lets a request leave, has one landing, decodes. Streams are compared with
what one instance says. The server is counted after the first instance has come back and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from footprint import SLACK, of_process, shared_memory
from kills import THREE, VICTIMS, kill, loaded
from load import PATH, wishes
from servers import Server, eventually

from taichi_serve.bench.client import stream

WISHES = wishes(24, seed=5, prompt=(100, 1500), output=(60, 250))


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
    wrong: list[str] = []
    streams, before, after = 0, {}, {}
    end = time.monotonic() + args.minutes * 60
    victims = [(phase, names[turn]) for turn in range(3) for phase, names in VICTIMS.items()]
    for phase, name in itertools.cycle(victims):
        started = time.monotonic()
        if started > end:
            break
        async with loaded(server, WISHES, reference) as load:
            seconds = await kill(load, name, phase)
            print(f"{name} killed while {phase}: computes again after {seconds:.0f} s", flush=True)
            await asyncio.sleep(max(0.0, args.every - (time.monotonic() - started)))  # the load's own time
        wrong, streams = wrong + load.wrong, streams + load.streams
        after = held(server)
        before = before or after
        print("  " + ", ".join(f"{what} {count}" for what, count in after.items()), flush=True)
    print(f"{streams} streams, wrong: {wrong or 'none'}")
    return verdict(before, after, server.state()["requests"]) or int(bool(wrong))


def verdict(before: dict[str, int], after: dict[str, int], requests: dict[str, int]) -> int:
    """Print what grew and what does not add up; 1 where something is wrong."""
    ended = sum(requests[how] for how in ("finished", "cancelled", "failed"))
    grown = {
        w: (before[w], after[w]) for w in before if w != "rss" and after[w] > before[w] + SLACK.get(w, 0)
    }
    agree = requests["accepted"] == ended
    print(f"requests: {requests}; accepted and ended {'agree' if agree else 'DIFFER'}")
    print(
        f"grown: {grown or 'nothing'}; memory of the server {before['rss'] >> 20} -> {after['rss'] >> 20} MiB"
    )
    return int(bool(grown) or not agree or requests["failed"] > 0)


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
