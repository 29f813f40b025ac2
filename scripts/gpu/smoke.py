"""Four instances on one GPU: token identity of moved requests, and 32 streams at 7B size that all move."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import move
from common import DECODERS, FOUR, bodies, fast_start, out_directory, run, server, state

from taichi_serve.bench.client import Answer
from taichi_serve.tiny import cached_tiny_model


def same(a: list[Answer], b: list[Answer]) -> str:
    """How many pairs have the same tokens and the same text."""
    equal = sum(x.tokens == y.tokens and x.text == y.text and y.ok for x, y in zip(a, b, strict=True))
    return f"{equal} of {len(a)}"


def identity(url: str) -> None:
    """Greedy and seeded streams, undisturbed and then moved."""
    jobs = bodies(32, 16, 1500, (300, 600))
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "seed": {"temperature": 0.8, "seed": 7},
        "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4},
        "grammar": {"structured_outputs": {"regex": "[a-z ]{200}"}, "ignore_eos": False},
    }
    for name, more in kinds.items():
        before = state(url)["moves"]["operator"]
        todo = [{**job, **more} for job in jobs]
        still, again = (asyncio.run(run(url, todo, 0, [])) for _ in range(2))
        moved = asyncio.run(run(url, todo, 5, ["i0", *DECODERS]))
        moves = state(url)["moves"]["operator"] - before
        print(
            f"identity, {name}: unmoved twice {same(still, again)}, moved {same(still, moved)}, {moves} moves"
        )
        first_difference(still, moved)
    print("bound:", state(url)["bound"], "moves:", state(url)["moves"])


def first_difference(a: list[Answer], b: list[Answer]) -> None:
    """Where two runs part, for whoever has to find out why."""
    for number, (x, y) in enumerate(zip(a, b, strict=True)):
        if not y.ok:
            print(f"  stream {number}: {y.error}")
        elif x.tokens != y.tokens:
            at = next((k for k, (p, q) in enumerate(zip(x.tokens, y.tokens, strict=False)) if p != q), -1)
            print(f"  stream {number} ({x.prompt_tokens} in) parts at token {at} of {len(x.tokens)}")


def small(out: Path, tiny: Path) -> None:
    """Identity, with a small model in float32."""
    flags = [
        *FOUR,
        *fast_start(),
        "--max-model-len",
        "4096",
        "--kv-cache-memory-bytes",
        "1G",
        "--dtype",
        "float32",
    ]
    with server(tiny, 8200, out / "tiny.log", *flags) as url:
        identity(url)


def main() -> None:
    """All checks, or those named after the directory: identity, auto, nixl."""
    # Triton multiplies float32 in TF32 unless told otherwise, and then equal work in another batch differs.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    out = out_directory()
    tiny = cached_tiny_model()
    for check in sys.argv[2:] or ("identity", "auto"):
        if check == "identity":
            small(out, tiny)
        else:
            move.run(("streams",), out, check)


if __name__ == "__main__":
    main()
