"""Four instances on one GPU: token identity of moved requests, and what a move costs at 7B size."""

from __future__ import annotations

import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

import httpx
from common import QWEN_7B, bodies, gaps, out_directory, quantiles, run, server, shape, tail

from taichi_serve.bench.client import Answer
from taichi_serve.tiny import cached_tiny_model

FOUR = ["--p-heavy", "1", "--d-heavy", "3", "--devices", "0;0;0;0"]
DECODERS = ["i1", "i2", "i3"]
FAST_START = ["--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}']


def same(a: list[Answer], b: list[Answer]) -> str:
    """How many pairs have the same tokens and the same text."""
    equal = sum(x.tokens == y.tokens and x.text == y.text and y.ok for x, y in zip(a, b, strict=True))
    return f"{equal} of {len(a)}"


def state(url: str) -> dict[str, Any]:
    """GET /taichi/state."""
    data: dict[str, Any] = httpx.get(f"{url}/taichi/state").json()
    return data


def identity(url: str) -> None:
    """Greedy and seeded streams, undisturbed and then moved."""
    jobs = bodies(32, 16, 1500, (48, 200))
    still = asyncio.run(run(url, jobs, 0, []))
    moved = asyncio.run(run(url, jobs, 5, ["i0", *DECODERS]))
    print("identity, greedy float32, 5 moves each:", same(still, moved), state(url)["moves"])
    seeded = [{**job, "temperature": 0.8, "seed": n} for n, job in enumerate(jobs)]
    still = asyncio.run(run(url, seeded, 0, []))
    again = asyncio.run(run(url, seeded, 0, []))
    print("identity, seeded, twice without moves:", same(still, again), "bound:", state(url)["bound"])


def cost(url: str, out: Path) -> None:
    """32 streams at 7B size without and with moves."""
    jobs = bodies(32, 500, 4000, (200, 300), seed=1)
    rows = {}
    for moves in (0, 3):
        answers = asyncio.run(run(url, jobs, moves, DECODERS))
        tpots = [a.tpot for a in answers]
        print(
            f"7B, {moves} moves each: ok {sum(a.ok for a in answers)} of 32, TTFT "
            f"{quantiles([a.ttft for a in answers])}, TPOT {quantiles(tpots)}, gap {quantiles(gaps(url, answers))}"
        )
        rows[str(moves)] = {"tpot_median": statistics.median(tpots), "gaps": gaps(url, answers)}
    print(state(url)["moves"])
    (out / "smoke.json").write_text(json.dumps(rows))


def main() -> None:
    """Both checks, one server after the other."""
    out = out_directory()
    tiny = cached_tiny_model()
    flags = [*FOUR, *FAST_START, "--max-model-len", "4096", "--kv-cache-memory-bytes", "1G", "--dtype", "float32"]
    with server(tiny, 8200, out / "tiny.log", *flags) as url:
        identity(url)
    large = shape(tiny, QWEN_7B, Path("/tmp/taichi-7b"))
    flags = [*FOUR, *FAST_START, "--max-model-len", "16384", "--kv-cache-memory-bytes", "6G"]
    with server(large, 8201, out / "large.log", *flags, "--load-format", "dummy", "--p-chunk", "4096") as url:
        try:
            cost(url, out)
        except BaseException:
            tail(out / "large.log")
            raise


if __name__ == "__main__":
    main()
