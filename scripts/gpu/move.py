"""What a move costs at 7B size: four instances on one GPU, one P-heavy and three D-heavy.

A gap has three parts: from the last token at the source to the last byte at the target (ours), from there to
the start of the target's next step (whatever step it is in must end), and that step. Printed are all of them,
how often a request was in the first step that began after its last byte, and what moves cost everybody else.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from common import (
    DECODERS,
    FOUR,
    NO_WEIGHTS,
    QWEN_7B,
    Mover,
    bodies,
    fast_start,
    kv_of_each,
    legs,
    out_directory,
    server,
    shape,
    state,
    tail,
)

from taichi_serve.bench.client import MANY, Answer, stream
from taichi_serve.tiny import cached_tiny_model

REHEARSAL = bool(
    os.environ.get("TAICHI_REHEARSAL")
)  # the same on a CPU with a tiny model: figures mean nothing
SIZES = (200, 700, 1400) if REHEARSAL else (1000, 4000, 8000)
SIZE = SIZES[1]
IDLE = 4 if REHEARSAL else 12  # requests of each size, two moves each
PAIRS = 2 if REHEARSAL else 5  # of rounds under load, one of the two with moves
LOADED = 4 if REHEARSAL else 28  # requests of such a round, two moves each
AT_ONCE = 2 if REHEARSAL else 8  # of these
BYSTANDERS = 2 if REHEARSAL else 12
STREAMS = 4 if REHEARSAL else 32
OUTPUT = 120 if REHEARSAL else 200
PATH = "/v1/completions"


def share(values: Sequence[float], q: float) -> float:
    """Quantile by rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def line(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, p90, p99 and largest in milliseconds, printed and kept."""
    if not values:
        print(f"    {name:<26} none")
        return {}
    row = {"n": len(values), **{f"p{round(100 * q)}": 1e3 * share(values, q) for q in (0.5, 0.9, 0.99, 1.0)}}
    print(f"    {name:<26} " + " / ".join(f"{value:.1f}" for key, value in row.items() if key != "n") + " ms")
    return row


def report(name: str, moved: list[dict[str, Any]], block_bytes: int) -> dict[str, Any]:
    """The parts of these moves."""
    moved = [leg for leg in moved if leg["timeline"] and leg["timeline"]["landed"]]
    if not moved:
        print(f"  {name}: none")
        return {"moves": 0}
    times = [leg["timeline"] for leg in moved]
    tokens = statistics.median(m["kv_tokens"] for m in moved)
    print(f"  {name}: {len(moved)} moves, median of {tokens:.0f} tokens")
    parts: dict[str, Callable[[dict[str, float]], float]] = {
        "ours": lambda t: t["landed"] - t["left"],
        "  until the server hears": lambda t: t["heard"] - t["left"],
        "  until the tail is begun": lambda t: t["began"] - t["heard"],
        "  copying the tail": lambda t: t["landed"] - t["began"],
        "target's step to end": lambda t: max(0.0, t["scheduled"] - t["landed"]),
        "its own step": lambda t: t["made"] - t["scheduled"],
        "until the server has it": lambda t: t["at"] - t["made"],
    }
    rows = {part.strip(): line(part, [of(t) for t in times]) for part, of in parts.items()}
    rows["gap"] = line("gap", [leg["gap"] for leg in moved])
    ahead = [t for t in times if t["ahead"]]
    first = sum(t["before"] <= t["landed"] for t in times) / len(times)
    seconds = max(1e-9, sum(t["copy_seconds"] for t in ahead))
    speed = sum(t["copied_blocks"] for t in ahead) * block_bytes / seconds
    print(f"    copied ahead {len(ahead)} of {len(times)}, at {speed / 1e9:.1f} GB/s")
    print(f"    in the first step after the last byte: {first:.1%}")
    return {**rows, "moves": len(times), "ahead": len(ahead), "first": first, "bytes_per_second": speed}


async def moved(
    client: httpx.AsyncClient, jobs: list[dict[str, Any]], moves: int, at_once: int
) -> list[Answer]:
    """So many of these at a time; each is moved `moves` times, every time to an instance it has not been
    on."""
    gate = asyncio.Semaphore(at_once)

    async def one(job: dict[str, Any], number: int) -> Answer:
        steps = [20 + 60 * k for k in range(moves)]
        async with gate:
            return await stream(client, PATH, job, Mover(client, steps, DECODERS, number) if moves else None)

    return await asyncio.gather(*(one(job, number) for number, job in enumerate(jobs)))


async def beside(
    client: httpx.AsyncClient, moves: int, seed: int, requests: int
) -> tuple[list[Answer], list[Answer]]:
    """Requests of the middle size, moved or not, while bystanders decode: (those, the bystanders)."""
    over = asyncio.Event()

    async def bystander(number: int) -> Answer:
        tokens = SIZE // 2 + number * SIZE // (2 * BYSTANDERS)
        output = 4 * OUTPUT if REHEARSAL else 6000
        job = bodies(1, tokens, tokens, (output, output), 1000 * seed + number)[0]

        async def until_over(answer: Answer) -> None:
            if over.is_set():
                raise httpx.ReadError("it has been watched long enough")

        return await stream(client, PATH, job, until_over)

    watched = [asyncio.create_task(bystander(number)) for number in range(BYSTANDERS)]
    jobs = bodies(requests, SIZE, SIZE, (OUTPUT, OUTPUT), seed)
    answers = await moved(client, jobs, moves, AT_ONCE)
    over.set()
    return answers, await asyncio.gather(*watched)


def tpot(answers: list[Answer], skip: int = 64) -> list[float]:
    """Seconds per token of each stream, once it is well under way."""
    found = []
    for answer in answers:
        later = [(at, count) for at, count in zip(answer.times, answer.counts, strict=True)][skip // 4 :]
        if len(later) > 4:
            found.append((later[-1][0] - later[0][0]) / sum(count for _, count in later[1:]))
    return found


async def every_one(client: httpx.AsyncClient, moves: int, seed: int) -> list[Answer]:
    """Many streams at once, each moved `moves` times among the D-heavy instances."""
    jobs = bodies(STREAMS, SIZE, SIZE, (2 * OUTPUT, 2 * OUTPUT), seed)

    async def one(job: dict[str, Any], number: int) -> Answer:
        chance = random.Random(number)
        steps = sorted(chance.sample(range(OUTPUT // 2, 2 * OUTPUT - 20), moves)) if moves else []
        return await stream(client, PATH, job, Mover(client, steps, DECODERS, number) if moves else None)

    return await asyncio.gather(*(one(job, number) for number, job in enumerate(jobs)))


Rows = dict[str, Any]


async def idle(client: httpx.AsyncClient, block_bytes: int) -> Rows:
    """One request after the other, of each size."""
    rows: Rows = {}
    for size in SIZES:
        answers = await moved(client, bodies(IDLE, size, size, (110, 110), seed=size), 2, 1)
        rows[f"idle {size}"] = report(
            f"idle, {size} tokens", await legs(client, answers, "operator"), block_bytes
        )
    return rows


async def loaded(client: httpx.AsyncClient, block_bytes: int) -> Rows:
    """Pairs of rounds of the same lengths, one with moves and one without, in turn which is first. Their
    tokens differ, or the second would find its prompts in the prefix cache."""
    times: dict[int, list[float]] = {0: [], 2: []}
    others: dict[int, list[float]] = {0: [], 2: []}
    answers = []
    for pair in range(PAIRS):
        for moves in (0, 2) if pair % 2 == 0 else (2, 0):
            ended, watched = await beside(client, moves, 5 + 2 * pair + (moves > 0), LOADED)
            times[moves].append(statistics.median(tpot(watched)))
            others[moves].append(statistics.median(a.tpot for a in ended if a.ok))
            answers += ended if moves else []
    return {
        "bystanders": compared("TPOT of bystanders", times[0], times[2]),
        "others": compared("TPOT of the others", others[0], others[2]),
        "moving": report("under load", await legs(client, answers, "operator"), block_bytes),
        "hand-over": report("hand-overs", await legs(client, answers, "hand-over"), block_bytes),
    }


def compared(name: str, still: list[float], moving: list[float]) -> dict[str, Any]:
    """The medians of each round, and of each pair the ratio."""
    ratios = [with_moves / without for without, with_moves in zip(still, moving, strict=True)]
    rows = {"still": still, "moving": moving, "ratio": statistics.median(ratios)}
    for how, values in (("still", still), ("moving", moving)):
        print(f"    {name}, {how}: {' '.join(f'{1000 * value:.1f}' for value in values)} ms")
    print(
        f"    {name}: {rows['ratio']:.3f} of that without moves, pairs {min(ratios):.3f} to {max(ratios):.3f}"
    )
    return rows


async def streams(client: httpx.AsyncClient, block_bytes: int) -> Rows:
    """Many at once, each moved seven times, between two rounds without any."""
    rows: Rows = {}
    for seed, how, moves in ((105, "still", 0), (106, "moving", 7), (107, "still again", 0)):
        answers = await every_one(client, moves, seed)
        name = f"{STREAMS} {how}"
        rows[name] = {
            "ok": sum(a.ok for a in answers),
            "tpot": line(f"{name}: TPOT", [a.tpot for a in answers]),
        }
        rows[name]["ttft"] = line(f"{name}: TTFT", [a.ttft for a in answers])
        if moves:
            found = await legs(client, answers, "operator")
            rows[name] |= report("each moved 7 times", found, block_bytes)
            some = len({leg["request"] for leg in found})
            print(f"    {rows[name]['ok']} of {STREAMS} ended as they should, {some} of them moved")
    return rows


PARTS = {"idle": idle, "loaded": loaded, "streams": streams}


async def measure(url: str, parts: Sequence[str], block_bytes: int) -> Rows:
    """These parts, one after the other."""
    rows: Rows = {}
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=MANY) as client:
        # First whatever is compiled once.
        await moved(client, bodies(4, SIZE, SIZE, (110, 110), seed=1), 2, 2)
        for part in parts:
            rows |= await PARTS[part](client, block_bytes)
    return rows


def run(parts: Sequence[str], out: Path, path: str = "auto") -> None:
    """Start the server, measure these parts with KV going the way called `path`; rows go to
    move-PATH.json."""
    tiny = cached_tiny_model()
    model = tiny if REHEARSAL else shape(tiny, QWEN_7B, Path("/tmp/taichi-7b"))
    flags = ["--max-model-len", "16384" if not REHEARSAL else "8192", "--p-chunk", "2048", "--d-chunk", "256"]
    if REHEARSAL:
        flags += [*FOUR[:4], "--enforce-eager"]
    else:
        flags += [
            *FOUR,
            *fast_start(),
            *NO_WEIGHTS,
            "--kv-cache-memory-bytes",
            kv_of_each(),
            "--stream-interval",
            "4",
        ]
    layers, heads = QWEN_7B["num_hidden_layers"], QWEN_7B["num_key_value_heads"]
    block_bytes = 16 * 2 * 2 * layers * heads * QWEN_7B["hidden_size"] // QWEN_7B["num_attention_heads"]
    log = out / f"move-{path}.log"
    with server(model, 8203, log, *flags, "--kv-over", path) as url:
        try:
            rows = asyncio.run(measure(url, parts, block_bytes))
        except BaseException:
            tail(log)
            raise
        print("moves:", state(url)["moves"])
        print("KV:", sorted(set(state(url)["kv_paths"].values())))
    (out / f"move-{path}.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    run(sys.argv[2:] or tuple(PARTS), out_directory())
