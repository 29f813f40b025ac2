"""Four instances on one GPU: documents that a grammar holds to their form, each moved three times and more.

The reference is one instance, undisturbed. Small model, float32, V2 model runner; also `bad_words`, which
that runner looks for in the output alone. Prints how many are identical, kind by kind.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from common import DECODERS, FOUR, Mover, bodies, fast_start, out_directory, server, state
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "integration"))

from documents import COMPLETIONS, KINDS, TOOLS, Document, documents

from taichi_serve.bench.client import MANY, Answer, stream
from taichi_serve.tiny import cached_tiny_model

COUNT = 32
MOVES = 5  # asked of each; three at least must be made
LEAST = 3
ATTEMPTS = 4
TARGETS = ["i0", *DECODERS]
# Backends that a machine may be without, and the kinds of grammar that need them.
NEEDS = {
    "xgrammar": set(KINDS) - {"guidance", "outlines"},
    "llguidance": {"guidance"},
    "outlines_core": {"outlines"},
}


def to_be_had() -> tuple[str, ...]:
    """Kinds of grammar whose backend is installed."""
    missing = {name for name in NEEDS if find_spec(name) is None}
    for name in missing:
        print(f"{name} is not installed: without {', '.join(sorted(NEEDS[name]))}")
    return tuple(kind for kind in KINDS if not any(kind in NEEDS[name] for name in missing))


def with_bad_words(url: str, model: Path) -> list[Document]:
    """Completions that may not say pairs of tokens that they would have said: a move may part such a pair."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    plain = [Document("bad_words", COMPLETIONS, body) for body in bodies(COUNT, 16, 700, (200, 300))]
    made = []
    for one, answer in zip(plain, asyncio.run(undisturbed(url, plain)), strict=True):
        pairs = [tokenizer.decode(answer.tokens[k : k + 2]) for k in range(5, len(answer.tokens) - 2, 7)]
        bad = [pair for pair in pairs if pair.strip() == pair and "\ufffd" not in pair][:20]
        made.append(Document(one.kind, one.path, {**one.body, "bad_words": bad or ["ба"]}))
    return made


def seeded(asked: list[Document]) -> list[Document]:
    """The same, drawn with a seed."""
    return [
        Document(f"{one.kind}, seed", one.path, {**one.body, "temperature": 0.8, "seed": 11}) for one in asked
    ]


async def undisturbed(url: str, asked: list[Document]) -> list[Answer]:
    """All at once, unmoved."""
    async with _client(url) as client:
        return await asyncio.gather(*(stream(client, one.path, one.body) for one in asked))


async def moved(url: str, asked: list[Document]) -> list[tuple[list[Answer], int]]:
    """All at once, each moved at tokens of chance until it was moved often enough in one go: its answers, and
    how often it was."""
    chance = random.Random(0)
    async with _client(url) as client:

        async def one(document: Document, number: int) -> tuple[list[Answer], int]:
            answers: list[Answer] = []
            made = 0
            while made < LEAST and len(answers) < ATTEMPTS:
                steps = sorted(chance.sample(range(1, 60), MOVES)) if not answers else [1] * MOVES
                answer = await stream(
                    client, document.path, document.body, Mover(client, steps, TARGETS, number)
                )
                answers.append(answer)
                made = await _moves(client, answer.id) if answer.id else 0
            return answers, made

        return await asyncio.gather(*(one(document, number) for number, document in enumerate(asked)))


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=600, limits=MANY)


async def _moves(client: httpx.AsyncClient, name: str) -> int:
    view = (await client.get(f"/taichi/requests/{name}")).json()["requests"][0]
    return sum(a["instance"] != b["instance"] for a, b in pairwise(view["legs"]))


def report(
    what: str,
    asked: list[Document],
    alone: list[Answer],
    again: list[Answer],
    results: list[tuple[list[Answer], int]],
) -> None:
    """A line for each kind, and one for all."""
    rows: dict[str, list[tuple[bool, bool, int]]] = {}
    for document, a, b, (answers, made) in zip(asked, alone, again, results, strict=True):
        same = a.ok and all(x.ok and x.tokens == a.tokens for x in answers)
        rows.setdefault(document.kind, []).append((same, b.ok and a.tokens == b.tokens, made))
        for x in answers:
            if not x.ok or x.tokens != a.tokens:
                pairs = enumerate(zip(x.tokens, a.tokens, strict=False))
                at = next((k for k, (p, q) in pairs if p != q), min(len(x.tokens), len(a.tokens)))
                print(f"  {document.kind}: parts at token {at} of {len(a.tokens)}, {x.error or x.finish}")
    every = (what, [row for one in rows.values() for row in one])
    for kind, found in [*(rows.items() if len(rows) > 1 else ()), every]:
        right, twice = sum(row[0] for row in found), sum(row[1] for row in found)
        each = [row[2] for row in found]
        print(
            f"identity, {kind}: moved {right} of {len(found)}, unmoved twice {twice}, "
            f"moves of each {min(each)} to {max(each)}, {sum(each)} in all"
        )


def run(out: Path, model: Path, more: list[str], flags: list[str]) -> None:
    """The three runs: grammars, grammars with a seed, bad words."""
    kinds = to_be_had()
    written = documents(COUNT, 3, "m", kinds) if kinds else []
    runs = {"all grammars": written, "all grammars, seed": seeded(written)} if written else {}
    alone: dict[str, tuple[list[Answer], list[Answer]]] = {}
    with server(model, 8210, out / "one.log", "--d-heavy", "1", *flags) as url:
        runs["bad_words"] = with_bad_words(url, model)
        for what, asked in runs.items():
            alone[what] = asyncio.run(undisturbed(url, asked)), asyncio.run(undisturbed(url, asked))
    with server(model, 8211, out / "four.log", *more, *flags) as url:
        for what, asked in runs.items():
            report(what, asked, *alone[what], asyncio.run(moved(url, asked)))
        now: dict[str, Any] = state(url)
        print("bound:", now["bound"], "moves:", now["moves"], "requests:", now["requests"])


def main() -> None:
    """On a GPU."""
    # Triton multiplies float32 in TF32 unless told otherwise, and then equal work in another batch differs.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    small = ["--max-model-len", "4096", "--kv-cache-memory-bytes", "1G", "--dtype", "float32"]
    run(out_directory(), cached_tiny_model(), FOUR, [*fast_start(), *small, *TOOLS])


if __name__ == "__main__":
    main()
