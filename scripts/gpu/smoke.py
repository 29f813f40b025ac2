"""Four instances on one GPU: token identity of moved requests, and what a move costs at 7B size."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from common import (
    ASKED,
    DECODERS,
    FOUR,
    QWEN_7B,
    bodies,
    fast_start,
    legs,
    out_directory,
    parts,
    quantiles,
    run,
    server,
    shape,
    state,
    tail,
)

from taichi_serve.bench.client import Answer
from taichi_serve.tiny import cached_tiny_model

ANY, LATE = (0.0, 0.67), (0.4, 0.95)  # shares of an output in which moves are asked for


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


def cost(url: str, out: Path, path: str) -> None:
    """32 streams at 7B size without and with moves; KV takes the way called `path`."""
    jobs = bodies(32, 500, 4000, (300, 400), seed=1)
    rows = {}
    # The last round moves only once all prompts are through, so that a step of the target is a decode step.
    for name, moves, window in (("still", 0, ANY), ("moving", 3, ANY), ("moving, decodes only", 7, LATE)):
        answers = asyncio.run(run(url, jobs, moves, DECODERS, window))
        moved = legs(url, answers)
        tpots = [a.tpot for a in answers]
        print(
            f"7B, {path}, {name}: ok {sum(a.ok for a in answers)} of 32, TTFT "
            f"{quantiles([a.ttft for a in answers])}, TPOT {quantiles(tpots)}, {len(moved)} moves"
        )
        print(parts(moved))
        print("  asked:", dict(ASKED), "moves:", state(url)["moves"])
        ASKED.clear()
        rows[name] = {"tpot_median": statistics.median(tpots), "legs": moved}
    print("  KV:", state(url)["kv_paths"])
    (out / f"smoke-{path}.json").write_text(json.dumps(rows))


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


def large(out: Path, tiny: Path, path: str) -> None:
    """Cost, at 7B size."""
    model = shape(tiny, QWEN_7B, Path("/tmp/taichi-7b"))
    flags = [*FOUR, *fast_start(), "--max-model-len", "16384", "--kv-cache-memory-bytes", "6G"]
    flags += ["--load-format", "dummy", "--p-chunk", "4096", "--kv-over", path]
    # One process answers for all instances: chunks of a few tokens keep it from being what is measured.
    flags += ["--stream-interval", "8"]
    with server(model, 8201, out / f"{path}.log", *flags) as url:
        try:
            cost(url, out, path)
        except BaseException:
            tail(out / f"{path}.log")
            raise


def main() -> None:
    """All checks, or those named after the directory: identity, auto, nixl."""
    # Triton multiplies float32 in TF32 unless told otherwise, and then equal work in another batch differs.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    out = out_directory()
    tiny = cached_tiny_model()
    for check in sys.argv[2:] or ("identity", "auto", "nixl"):
        if check == "identity":
            small(out, tiny)
        else:
            large(out, tiny, check)


if __name__ == "__main__":
    main()
