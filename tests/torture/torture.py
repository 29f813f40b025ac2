"""Worlds by their seeds, one after the other: `python tests/torture/torture.py --runs 20000`.

It prints each seed that found something, how often each row of the tables of stages and passages was taken,
and how many runs were clean; the exit status is 1 when one was not. `--seed N --verbose` shows one run.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from world import World

from taichi_serve.cluster.vllm.server.itinerary import Itinerary
from taichi_serve.cluster.vllm.server.passage import PASSINGS, Passage
from taichi_serve.stage import STAGES, Stage

Rows = Counter[tuple[str, str]]


def run(seed: int) -> list[str]:
    """What is wrong with the world of this seed."""
    return world(seed)[1]


def world(seed: int) -> tuple[World, list[str]]:
    """The world of this seed after its run, and what is wrong with it."""
    with tempfile.TemporaryDirectory() as directory:
        made = World(seed, Path(directory))
        return made, asyncio.run(made.live())


def counting(rows: Rows) -> None:
    """Count the rows of both tables that are taken from now on."""
    enter, passes = Itinerary._enter, Passage.enter

    def entered(self: Itinerary, stage: Stage) -> None:
        rows[self.stage.value, stage.value] += 1
        enter(self, stage)

    def passed(self: Passage, passing: object) -> None:
        rows[f"kv {self.passing.value}", f"kv {passing.value}"] += 1  # type: ignore[attr-defined]
        passes(self, passing)  # type: ignore[arg-type]

    Itinerary._enter = entered  # type: ignore[method-assign]
    Passage.enter = passed  # type: ignore[method-assign, assignment]


def table(rows: Rows) -> str:
    """Every row of both tables, and how often it was taken."""
    legal = [(a.value, b.value) for a, after in STAGES.items() for b in after]
    legal += [(f"kv {a.value}", f"kv {b.value}") for a, after in PASSINGS.items() for b in after]
    return "\n".join(f"  {a:>14} -> {b:<14} {rows[a, b]:>9}" for a, b in sorted(legal))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--verbose", action="store_true", help="every fact and decision of the first seed")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if args.verbose:
        made, found = world(args.seed)
        for event, commands in made.log:
            print(event, *(f"\n    {command}" for command in commands))
        print("\n".join(found) or "clean")
        return int(bool(found))
    rows: Rows = Counter()
    fetches: Counter[str] = Counter()
    counting(rows)
    began, bad = time.monotonic(), 0
    for seed in range(args.seed, args.seed + args.runs):
        made, found = world(seed)
        fetches += made.seen
        if found:
            bad += 1
            print(f"seed {seed}: " + "; ".join(found)[:1000], flush=True)
    print(table(rows))
    print(f"  prefixes: {dict(fetches)}")
    seeds = f"seeds {args.seed} to {args.seed + args.runs - 1}"
    print(f"{args.runs - bad} of {args.runs} runs clean, {seeds}, {time.monotonic() - began:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
