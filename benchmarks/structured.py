"""How many documents that a grammar holds to their form say the same after moves as without any.

    python benchmarks/structured.py [--documents 32] [--moves 3] [-- FLAGS OF TAICHI SERVE]

Documents of every kind of grammar (tests/integration/documents.py) are asked of one instance, undisturbed,
and of a P-heavy and a D-heavy one, where each is moved in the middle, the given number of times at least.
Tiny model, float32, greedy. Exit code 1 if one differs, or was not moved so often.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from documents import TOOLS, Document, documents
from load import instances_of, moves, pusher
from servers import Server

from taichi_serve.bench.client import Answer, stream

TWO = ("--p-heavy", "1", "--d-heavy", "1")
ATTEMPTS = 8  # a short one may be over before its last move


async def undisturbed(server: Server, asked: list[Document]) -> list[Answer]:
    async with server.client() as client:
        return await asyncio.gather(*(stream(client, one.path, one.body) for one in asked))


async def moved(server: Server, one: Document, times: int) -> tuple[list[Answer], int]:
    """Its answers until it was moved so often in one go, from its first token on, and how often it was."""
    answers: list[Answer] = []
    made = 0
    async with server.client() as client:
        while made < times and len(answers) < ATTEMPTS:
            answer = await stream(client, one.path, one.body, pusher(client, [1] * times))
            answers.append(answer)
            made = moves(await instances_of(client, answer.id)) if answer.id else 0
    return answers, made


def report(asked: list[Document], reference: list[Answer], results: list[tuple[list[Answer], int]]) -> int:
    """A line for each kind and one for all; how many are right and were moved often enough."""
    good: dict[str, list[bool]] = {}
    for one, alone, (answers, _) in zip(asked, reference, results, strict=True):
        same = alone.ok and all(a.ok and a.tokens == alone.tokens for a in answers)
        good.setdefault(one.kind, []).append(same)
    for kind, same in good.items():
        tokens = sum(len(a.tokens) for a, one in zip(reference, asked, strict=True) if one.kind == kind)
        print(f"{kind:16} {sum(same):2} of {len(same):2} identical, {tokens} tokens")
    total = sum(map(sum, good.values()))
    made = [number for _, number in results]
    print(f"{'all':16} {total} of {len(asked)} identical, {min(made)} to {max(made)} moves each, {sum(made)}")
    return total


async def compare(alone: Server, two: Server, count: int, times: int) -> bool:
    """Print the counts; whether every document is right and was moved often enough."""
    asked = documents(count, seed=3)
    reference = await undisturbed(alone, asked)
    results = await asyncio.gather(*(moved(two, one, times) for one in asked))
    state = two.state()
    print(f"moves {state['moves']}")
    print(f"bound {state['bound']}, failed {state['requests']['failed']}")
    return report(asked, reference, results) == count and all(made >= times for _, made in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--moves", type=int, default=3)
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        alone = Server(Path(directory) / "alone", "--d-heavy", "1", *TOOLS, *args.flags)
        two = Server(Path(directory) / "two", *TWO, *TOOLS, *args.flags)
        try:
            alone.wait_ready(), two.wait_ready()
            good = asyncio.run(compare(alone, two, args.documents, args.moves))
        finally:
            alone.end(), two.end()
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
