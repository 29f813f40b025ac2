"""What a move costs: seconds between the last token here and the first one there, idle and under load.

    python benchmarks/moves.py [--moves 50] [--prompt 700]

It starts a server of one P-heavy and one D-heavy instance with the tiny model. Every move is of a fresh
request, so that all of its KV has to come over. Under load both instances prefill and decode all the
time, and the gap is also counted in steps of the target, whose mean duration is measured around the move.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import itertools
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from load import PATH, Wish, push, view
from servers import Server

from taichi_serve.bench.client import Answer, stream

WINDOW = 1.0  # seconds before and after a move over which the target's steps are counted


def fresh(size: int, chance: random.Random) -> list[int]:
    """A prompt that no cache knows."""
    return [chance.randrange(300, 4000) for _ in range(size)]


async def one_move(client: httpx.AsyncClient, prompt: list[int]) -> dict[str, Any] | None:
    """Begin a request, move it once after some tokens, and return the leg that the move began."""
    asked = False

    async def on_tokens(answer: Answer) -> None:
        nonlocal asked
        if not asked and len(answer.tokens) >= 10:
            asked = await push(client, answer.id)

    answer = await stream(client, PATH, Wish(prompt, 120).body(), on_tokens)
    assert answer.ok, answer.error
    history = await view(client, answer.id)
    by_leg = {row["leg"]: row["move"] for row in history["log"] if row["type"] == "Flow"}
    legs = [leg for leg in history["legs"] if by_leg.get(leg["leg"]) == "operator"]
    return legs[0] if legs else None


async def moves(client: httpx.AsyncClient, count: int, size: int, seed: int) -> list[dict[str, Any]]:
    """So many moves, one after the other."""
    chance = random.Random(seed)
    found: list[dict[str, Any]] = []
    for _ in range(2 * count):  # one that ended before it could move is done again
        if (leg := await one_move(client, fresh(size, chance))) is not None:
            found.append(leg)
        if len(found) == count:
            break
    return found


class Steps:
    """The step counters of every instance over time."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.counts: list[dict[str, int]] = []

    async def watch(self, client: httpx.AsyncClient) -> None:
        """Read them ten times a second."""
        while True:
            state = (await client.get("/taichi/state")).json()
            self.at.append(time.monotonic())
            self.counts.append({i["name"]: i["steps"] for i in state["instances"]})
            await asyncio.sleep(0.1)

    def seconds(self, name: str, at: float) -> float:
        """Mean duration of a step of this instance around that time."""
        first = max(0, bisect.bisect(self.at, at - WINDOW) - 1)
        last = min(len(self.at) - 1, bisect.bisect(self.at, at + WINDOW))
        steps = self.counts[last][name] - self.counts[first][name]
        return (self.at[last] - self.at[first]) / max(1, steps)


async def load(client: httpx.AsyncClient, chance: random.Random, output: int) -> None:
    """One user after the other, for as long as it lasts."""
    while True:
        wish = Wish(fresh(chance.randint(200, 1200), chance), output)
        await stream(client, PATH, wish.body())


def row(title: str, values: list[float], unit: str) -> str:
    """Median, 95th percentile and largest."""
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return f"{title:34} {statistics.median(ordered):8.1f} {p95:8.1f} {ordered[-1]:8.1f}  {unit}"


PARTS = ["left", "heard", "began", "landed", "scheduled", "made", "at"]


def parts(title: str, legs: list[dict[str, Any]]) -> None:
    """What the gaps are made of: each part ends with the thing it is named after."""
    times = [leg["timeline"] for leg in legs if leg["timeline"]]
    for before, name in itertools.pairwise(PARTS):
        print(row(f"{title}: {name}", [1000 * (t[name] - t[before]) for t in times], "ms"))


async def run(server: Server, count: int, size: int) -> None:
    async with server.client() as client:
        await moves(client, 3, size, seed=0)
        idle = await moves(client, count, size, seed=1)
        steps = Steps()
        chance = random.Random(2)
        tasks = [asyncio.create_task(steps.watch(client))]
        # Short outputs keep prefills coming, long ones keep decodes resident.
        tasks += [asyncio.create_task(load(client, chance, 8 if k % 2 else 200)) for k in range(8)]
        await asyncio.sleep(3)  # the load is to be there
        busy = await moves(client, count, size, seed=3)
        await asyncio.sleep(WINDOW)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
    print(f"{'gap of a move of ' + str(size) + ' tokens':34} {'median':>8} {'p95':>8} {'max':>8}")
    print(row(f"idle, {len(idle)} moves", [1000 * leg["gap"] for leg in idle], "ms"))
    print(row(f"under load, {len(busy)} moves", [1000 * leg["gap"] for leg in busy], "ms"))
    in_steps = [leg["gap"] / steps.seconds(leg["instance"], leg["first_token_at"]) for leg in busy]
    print(row("under load", in_steps, "steps of the target"))
    parts("idle", idle)
    parts("under load", busy)
    state = server.state()
    late = [instance["late_kv"] for instance in state["instances"]]
    print(f"recomputed: {state['moves']['recomputes']}, KV too late: {late}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moves", type=int, default=50, help="moves of each kind (default: 50)")
    parser.add_argument("--prompt", type=int, default=700, help="prompt tokens (default: 700)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory) / "server", "--p-heavy", "1", "--d-heavy", "1")
        try:
            asyncio.run(run(server.wait_ready(), args.moves, args.prompt))
        finally:
            server.end()


if __name__ == "__main__":
    main()
