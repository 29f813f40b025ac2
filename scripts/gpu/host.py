"""KV on the host, at 7B size: two instances on one GPU with so little KV that conversations evict each other.

    scripts/h200.sh host [out-dir]

    device, host   conversations one after the other, then the next turn of each: TTFT of those, with what the
                   devices still have, and with `--kv-offloading-size`
    peer           of the second: prompts whose prefix only the host of i0 has, asked on i1, against new ones
    tokens         a tiny model in float32: 20 streams that are moved and evicted, for three turns, say what
                   they say where there is room for all of them

Figures go to host.json. With TAICHI_REHEARSAL=1 all of it runs on a CPU with the tiny model, where times mean
nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from common import NO_WEIGHTS, QWEN_7B, Mover, bodies, fast_start, out_directory, server, shape, state, tail
from prefix import ask, only, prefilled

from taichi_serve.bench.client import Answer, stream
from taichi_serve.tiny import cached_tiny_model

REHEARSAL = bool(os.environ.get("TAICHI_REHEARSAL"))
COUNT, SIZE, ANSWER, MORE = (6, 600, 40, 20) if REHEARSAL else (12, 8000, 200, 60)  # conversations, tokens
DEVICE = 3 << 19 if REHEARSAL else 3 << 29  # bytes of KV: of two or three conversations
HOST = ("--kv-offloading-size", "0.125" if REHEARSAL else "8")
LIMIT = 1024 if REHEARSAL else 10240
PATH = "/v1/completions"
TWO = ("--d-heavy", "2", "--d-chunk", "1024", "--ttft-slo", "60", "--tpot-slo", "1")
TWO += () if REHEARSAL else ("--devices", "0;0")
Rows = dict[str, Any]
EAGER = ("--enforce-eager", "--block-size", "32") if REHEARSAL else ()


@contextlib.contextmanager
def large(out: Path, name: str, *flags: str) -> Iterator[str]:
    """Two instances of the 7B shape."""
    log = out / f"host-{name}.log"
    model = cached_tiny_model() if REHEARSAL else shape(cached_tiny_model(), QWEN_7B, Path("/tmp/taichi-7b"))
    fast = EAGER if REHEARSAL else (*fast_start(), *NO_WEIGHTS)
    limits = ("--max-model-len", str(LIMIT), "--kv-cache-memory-bytes", str(DEVICE))
    with server(model, 8206, log, *TWO, *limits, *fast, "--enable-prompt-tokens-details", *flags) as url:
        try:
            yield url
        except BaseException:
            tail(log)
            raise


# -------------------------------------------------------------------------------------------- the next turn


async def turns(url: str) -> Rows:
    """TTFT of the next turns, and what was found of them where."""
    chance = random.Random(3)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        jobs = bodies(COUNT, SIZE, SIZE, (ANSWER, ANSWER), seed=1)
        answers = [await stream(client, PATH, job) for job in jobs]
        rows = []
        for job, answer in zip(jobs, answers, strict=True):
            assert answer.ok, answer.error
            more = [chance.randrange(300, 4000) for _ in range(MORE)]
            again = await ask(client, [*job["prompt"], *answer.tokens, *more])
            found = await prefilled(client, again)
            rows.append({"ttft": again.ttft, **{k: found.get(k, 0) for k in ("cached", "loaded", "fetched")}})
    held = {i["name"]: (i["cached_blocks"], i["host_blocks"]) for i in state(url)["instances"]}
    return {"median_ttft": statistics.median(row["ttft"] for row in rows), "turns": rows, "blocks": held}


def said(name: str, found: Rows) -> None:
    """One line of a stage."""
    rows = found["turns"]
    tokens = {kind: sum(row[kind] for row in rows) for kind in ("cached", "loaded", "fetched")}
    what = ", ".join(f"{count} {kind}" for kind, count in tokens.items())
    print(f"  {name}: TTFT {1e3 * found['median_ttft']:.1f} ms at the median; tokens: {what}", flush=True)


# -------------------------------------------------------------------------------------------------- a peer


async def lent(url: str) -> Rows:
    """TTFT on i1 of prompts whose prefix the host of i0 has, and of new ones, in turn."""
    kinds: dict[str, list[Rows]] = {"lent": [], "computed": []}
    prompts = [job["prompt"] for job in bodies(2 * COUNT, SIZE, SIZE, (1, 1), seed=7)]
    known, new = prompts[:COUNT], prompts[COUNT:]
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for number, job in enumerate(bodies(6, SIZE // 2, SIZE // 2, (100, 100), seed=11)):
            await stream(client, PATH, job, Mover(client, [20, 50], ["i0", "i1"], number))
        await only(client, "i0")
        for prompt in known:
            await ask(client, prompt)
        await only(client, "i1")
        for pair in zip(known, new, strict=True):
            for kind, prefix in zip(kinds, pair, strict=True):
                answer = await ask(client, [*prefix, *[9] * MORE])
                found = await prefilled(client, answer)
                kinds[kind].append(
                    {"ttft": answer.ttft, **{k: found.get(k, 0) for k in ("fetched", "loaded")}}
                )
    medians = {kind: statistics.median(row["ttft"] for row in rows) for kind, rows in kinds.items()}
    fetched = sum(row["fetched"] > 0 for row in kinds["lent"])
    print(
        f"  peer: fetched {fetched} of {COUNT}; TTFT "
        + str({k: f"{1e3 * v:.1f} ms" for k, v in medians.items()})
    )
    return {"median_ttft": medians, "prompts": kinds}


# -------------------------------------------------------------------------------------------------- tokens


@contextlib.contextmanager
def small(out: Path, name: str, *flags: str) -> Iterator[str]:
    """The tiny model in float32."""
    fast = EAGER or fast_start()
    words = ("--dtype", "float32", "--max-model-len", "1024", *fast, *flags)
    with server(cached_tiny_model(), 8207, out / f"host-{name}.log", *words) as url:
        yield url


async def spoken(url: str, asked: list[Rows], moves: int) -> list[Answer]:
    """All at once, each moved so often."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        jobs = []
        for number, job in enumerate(asked):
            steps = sorted(random.Random(number).sample(range(2, job["max_tokens"] // 2), moves))
            mover = Mover(client, steps, ["i0", "i1"], number) if moves else None
            jobs.append(stream(client, PATH, job, mover))
        return await asyncio.gather(*jobs)


def next_turn(asked: list[Rows], answers: list[Answer], seed: int) -> list[Rows]:
    """What its user says next to each of them."""
    chance = random.Random(seed)
    return [
        job | {"prompt": [*job["prompt"], *answer.tokens, *(chance.randrange(300, 4000) for _ in range(10))]}
        for job, answer in zip(asked, answers, strict=True)
    ]


def tokens(out: Path) -> Rows:
    """How many of the streams are the same, turn by turn."""
    asked, same = bodies(20, 16, 300, (60, 60), seed=5), []
    rounds = []
    with small(out, "single", "--d-heavy", "1", "--kv-cache-memory-bytes", str(256 << 20)) as url:
        for number in range(3):
            answers = asyncio.run(spoken(url, asked, 0))
            rounds.append((asked, answers))
            asked = next_turn(asked, answers, number)
    tiny = ("--kv-cache-memory-bytes", str(3 << 20), "--kv-offloading-size", "0.125")
    with small(out, "tokens", *TWO, *tiny) as url:
        for asked, reference in rounds:
            answers = asyncio.run(spoken(url, asked, 2))
            same.append(sum(a.ok and a.tokens == r.tokens for a, r in zip(answers, reference, strict=True)))
        view = state(url)
    print(f"  tokens: {same} of 20 are the same; moves {view['moves']}", flush=True)
    blocks = {i["name"]: i["host_blocks"] for i in view["instances"]}
    return {"same": same, "moves": view["moves"], "host_blocks": blocks}


def main() -> int:
    """All stages."""
    out, found = out_directory(), Rows()
    print(subprocess.check_output(["df", "-h", "/dev/shm"], text=True), flush=True)
    with large(out, "device") as url:
        found["device"] = asyncio.run(turns(url))
        said("device", found["device"])
    with large(out, "host", *HOST) as url:
        found["host"] = asyncio.run(turns(url))
        said("host", found["host"])
        found["peer"] = asyncio.run(lent(url))
    found["tokens"] = tokens(out)
    (out / "host.json").write_text(json.dumps(found, indent=1))
    return 0 if found["tokens"]["same"] == [20, 20, 20] else 1


if __name__ == "__main__":
    raise SystemExit(main())
