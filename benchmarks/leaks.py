"""Whether anything grows with the number of moves: descriptors, mappings, threads, memory, files, KV.

    python benchmarks/leaks.py [--moves 10000] [--every 1000] [-- FLAGS OF TAICHI SERVE]

It starts a server of one P-heavy and one D-heavy instance with the tiny model, and moves many streams to and
fro at once. After every so many moves the streams end, and with the server idle it is counted what each
process holds (i0.1 is the second child of the engine i0: on a CPU its worker). The exit status is 1 when
something has grown since the end of the warm-up (tests/integration/footprint.py says what that means), or
when a stream did not get all of its tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from footprint import BYTES_IN_LEAPS, BYTES_PER_MOVE, MEMORY, Held, Sample, grown, sample
from load import PATH, Wish
from servers import Server, eventually

from taichi_serve.bench.client import Answer, stream
from taichi_serve.messages import Flow, Flowed, Move, Timeline

# So little that the warm-up touches all of it: memory that is first used later would look like a leak.
KV_BYTES = 32 << 20
PROMPT, OUTPUT = 64, 600
APART = 4  # tokens between a move and the wish for the next
COLUMNS = ("descriptors", "sockets", "threads", "mappings", *MEMORY)


class Traffic:
    """Streams that move to and fro until so many moves were asked for."""

    def __init__(self, client: httpx.AsyncClient, wanted: int, chance: random.Random) -> None:
        self.client = client
        self.wanted = wanted
        self.chance = chance
        self.asked = 0

    async def run(self, streams: int) -> None:
        """So many streams at once, each followed by another one, until all moves are asked for."""

        async def lane() -> None:
            while self.asked < self.wanted:
                await self.one(Wish(self.prompt(PROMPT), OUTPUT))

        await asyncio.gather(*(lane() for _ in range(streams)))

    def prompt(self, length: int) -> list[int]:
        """One that no cache knows."""
        return [self.chance.randrange(300, 4000) for _ in range(length)]

    async def one(self, wish: Wish) -> None:
        """One stream, which must get all of its tokens."""
        answer = await stream(self.client, PATH, wish.body(), self.mover())
        whole = answer.ok and len(answer.tokens) == wish.max_tokens
        assert whole, f"{answer.id} ended after {len(answer.tokens)} tokens: {answer.error or answer.finish}"

    def mover(self) -> Callable[[Answer], Awaitable[None]]:
        """Wishes for a move to the other instance again and again; 409 while the last one is not over."""
        to, due = "i1", 1

        async def on_tokens(answer: Answer) -> None:
            nonlocal to, due
            if len(answer.tokens) < due or self.asked >= self.wanted:
                return
            said = await self.client.post(f"/taichi/requests/{answer.id}/flow", json={"to": to})
            assert said.status_code in (202, 409), said.text
            if said.status_code == 202:
                self.asked += 1
                to, due = ("i0" if to == "i1" else "i1"), len(answer.tokens) + APART

        return on_tokens


async def fill(client: httpx.AsyncClient, state: dict[str, Any], streams: int, chance: random.Random) -> None:
    """Do once whatever takes memory when it is first done: it would look like a leak later.

    Prompts that no cache knows, each moved to the other instance, use every block. On a CPU the kernels keep
    more than a MiB for every number of tokens that a step had, so each number has its turn.
    """
    traffic = Traffic(client, 1 << 30, chance)
    tokens, size = max(instance["kv_capacity"] for instance in state["instances"]), 2000
    lengths = [*range(1, state["sliders"]["d_chunk"] + streams + 1), *[size] * -(-3 * tokens // (2 * size))]
    for length in lengths:
        await traffic.one(Wish(traffic.prompt(length), 8))


def remembered() -> int:
    """Bytes that the server keeps of one move of a request, as long as it is among the last 10,000."""
    times = Timeline(*(float(k) for k, _ in enumerate(fields(Timeline))))
    flowed = Flowed(1.0, "", 1, "", 2, 3, 4.0, 5, times)
    return size_of(Flow("", 1, "", Move.OPERATOR)) + size_of(flowed)


def size_of(message: Any) -> int:
    """Of a message with its numbers; its words are kept elsewhere anyway."""
    whole = sys.getsizeof(message) + 8  # and its place in the list
    for value in (getattr(message, field.name) for field in fields(message)):
        if is_dataclass(value):
            whole += size_of(value)
        elif isinstance(value, int | float):
            whole += sys.getsizeof(value)
    return whole


def idle(server: Server) -> Sample:
    """Count when nothing runs, no KV is held and no client is connected."""
    process = psutil.Process(server.process.pid)

    def alone() -> bool:
        return not [c for c in process.net_connections("tcp") if c.laddr.port == server.port and c.raddr]

    state = server.quiet(60)
    eventually(alone, 30, "no client is connected")
    return sample(server, state)


def show(found: Sample) -> None:
    """A row for each process."""
    for name, held in found.held.items():
        cells = [f"{cell(what, held):>11}" for what in COLUMNS if what in held]
        cells += [f"{what} {held[what]}" for what in held if what not in COLUMNS]  # of the machine
        print(f"{found.moves:>8}  {name:10}", *cells, flush=True)


def cell(what: str, held: Held) -> str:
    """Memory is in MiB."""
    return f"{held[what] / (1 << 20):.1f}" if what in MEMORY else str(held[what])


async def rounds(server: Server, args: argparse.Namespace) -> list[Sample]:
    """The samples from the end of the warm-up on."""
    chance = random.Random(args.seed)
    found: list[Sample] = []
    while not found or found[-1].moves < args.moves:
        async with server.client() as client:
            if not found:
                await fill(client, server.state(), args.streams, chance)
            await Traffic(client, args.every if found else args.warm_up, chance).run(args.streams)
        found.append(idle(server))
        show(found[-1])
    return found


def check(server: Server, args: argparse.Namespace) -> int:
    """Move, count, judge."""
    print(f"{'moves':>8}  {'process':10}", *(f"{name:>11}" for name in COLUMNS), "(memory in MiB)")
    show(idle(server))
    began = time.monotonic()
    found = asyncio.run(rounds(server, args))
    state = server.state()
    requests, recomputes = state["requests"]["accepted"], state["moves"]["recomputes"]
    seconds = time.monotonic() - began
    print(f"{found[-1].moves} moves of {requests} requests in {seconds:.0f} s, {recomputes} recomputed")
    kept = remembered()
    print(f"allowed: {BYTES_PER_MOVE} bytes a move, {BYTES_IN_LEAPS} with leaps; for the server {kept} more")
    wrong = grown(found, {"server": kept})
    print("\n".join(wrong) or "nothing grows")
    return 1 if wrong else 0


def main() -> int:
    """Start, check, stop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moves", type=int, default=10_000, help="with the warm-up (default: 10000)")
    parser.add_argument(
        "--warm-up", type=int, default=1000, help="moves before the first count (default: 1000)"
    )
    parser.add_argument("--every", type=int, default=1000, help="moves between two counts (default: 1000)")
    parser.add_argument("--streams", type=int, default=16, help="at once (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="of taichi serve, after --")
    args = parser.parse_args()
    if args.moves < args.warm_up + 3 * args.every:
        parser.error("--moves must be at least --warm-up and three times --every: a median of three")
    with tempfile.TemporaryDirectory() as directory:
        words = ["--p-heavy", "1", "--d-heavy", "1", "--kv-cache-memory-bytes", str(KV_BYTES), *args.flags]
        server = Server(Path(directory) / "server", *words)
        try:
            status = check(server.wait_ready(), args)
            server.stop()
            return status
        except AssertionError:
            print(server.said()[-4000:])
            raise
        finally:
            server.end()


if __name__ == "__main__":
    sys.exit(main())
