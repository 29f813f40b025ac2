"""Prefix caches at 7B size: four instances on one GPU, one P-heavy and three D-heavy.

    scripts/h200.sh prefix [out-dir] [stage ...]

Stages, each with a server of its own and a file of its own (prefix-STAGE.json):

    link     TTFT of prompts whose first 4,000 and 16,000 tokens another instance has, against prompts of that
             length that nobody has, and those that the instance itself has; on the P-heavy and a D-heavy one
    fetch, known, blind
             conversations at a fixed rate with `--prefixes` so
    stock    the same on four servers of vLLM's own, one after the other in turn

A stage whose file is there is not run again, and none is begun that would not end within nine minutes from
the start: the same command goes on with the rest. With TAICHI_REHEARSAL=1 all of it runs on a CPU with a tiny
model, where figures mean nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from common import (
    FOUR,
    NO_WEIGHTS,
    QWEN_7B,
    Mover,
    bodies,
    fast_start,
    kv_of_each,
    out_directory,
    ready,
    shape,
    state,
    tail,
    vllm,
)
from common import server as serving

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from conversing import Traffic, converse, words

from taichi_serve.bench.client import Answer, stream
from taichi_serve.slo import SLO
from taichi_serve.tiny import cached_tiny_model

REHEARSAL = bool(os.environ.get("TAICHI_REHEARSAL"))
ENOUGH = 540.0  # seconds for all stages of one call
SIZES = (512, 2048) if REHEARSAL else (4000, 16000)
ROUNDS = 2 if REHEARSAL else 6
MORE = 64  # prompt tokens behind the prefix
LIMIT = 4096 if REHEARSAL else 20480
INSTANCES = 2 if REHEARSAL else 4
RATE = float(os.environ.get("TAICHI_RATE", "1" if REHEARSAL else "8"))  # requests/s
TRAFFIC = Traffic(
    "conversations:share=0.8,think=5,system=200,message=60,answer=12,result=100,call=8"
    if REHEARSAL
    else "conversations:share=0.85",
    RATE,
    counted=12 if REHEARSAL else 540,
    warm_up=4 if REHEARSAL else 60,
    limit=LIMIT,
    slo=SLO(2.0, 0.06),
)
PATIENT = SLO(60.0, 1.0)  # for what is measured one by one: no fetch is too late
SEED = 12
PATH = "/v1/completions"
FLAGS = ["--max-model-len", str(LIMIT), "--enable-prompt-tokens-details"]
MPS = [] if REHEARSAL else [*fast_start(), *NO_WEIGHTS]
OURS = ["--p-chunk", "2048", "--d-chunk", "256"]
Rows = dict[str, Any]


def engine_flags() -> list[str]:
    """What instances of ours and servers of vLLM's own have in common."""
    if REHEARSAL:
        return [*FLAGS, "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]
    return [*FLAGS, *MPS, "--kv-cache-memory-bytes", kv_of_each()]


def our_flags(prefixes: str, slo: SLO) -> list[str]:
    """Four instances that do this about prefixes."""
    instances = ["--p-heavy", "1", "--d-heavy", "1"] if REHEARSAL else FOUR
    goal = ["--ttft-slo", f"{slo.ttft:g}", "--tpot-slo", f"{slo.tpot:g}"]
    return [*instances, *OURS, *goal, *engine_flags(), "--prefixes", prefixes]


# ------------------------------------------------------------------------------------- fetched or computed


async def only(client: httpx.AsyncClient, name: str) -> None:
    """From now on prompts are computed on this instance; the others keep what they have."""
    view = (await client.get("/taichi/state")).json()["instances"]
    for other in (name, *(i["name"] for i in view if i["name"] != name)):
        what = "resume" if other == name else "drain"
        (await client.post(f"/taichi/instances/{other}/{what}")).raise_for_status()
    until = time.monotonic() + 10
    while True:
        view = (await client.get("/taichi/state")).json()["instances"]
        if all(i["draining"] == (i["name"] != name) for i in view):
            return
        assert time.monotonic() < until, f"not within 10 s: only {name} takes prompts"
        await asyncio.sleep(0.05)


async def ask(client: httpx.AsyncClient, prompt: list[int]) -> Answer:
    """One token for this prompt."""
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    answer = await stream(client, PATH, body | {"return_token_ids": True})
    assert answer.ok, answer.error
    return answer


async def prefilled(client: httpx.AsyncClient, answer: Answer) -> Rows:
    """What the instance found of its prompt, as the server recorded it."""
    view = (await client.get(f"/taichi/requests/{answer.id}")).json()["requests"][0]
    return next(row for row in view["log"] if row["type"] == "Prefilled")


async def rounds(client: httpx.AsyncClient, holder: str, target: str, size: int) -> Rows:
    """The holder gets the prefixes; then the target is asked in turn for one of them, for one that nobody
    has, and for the first again, which it has itself by then."""
    kinds = ("fetched", "computed", "own")
    rows: dict[str, list[Rows]] = {kind: [] for kind in kinds}
    seed = 1000 * size + int(target.removeprefix("i"))
    for number in range(ROUNDS):
        held, new = (job["prompt"] for job in bodies(2, size, size, (1, 1), seed=97 * seed + number))
        await only(client, holder)
        await ask(client, held)
        await only(client, target)
        first = [("fetched", held), ("computed", new)]
        for kind, prefix in (first if number % 2 else first[::-1]) + [("own", held)]:
            answer = await ask(client, [*prefix, *[7 if kind == "own" else 8] * MORE])
            found = await prefilled(client, answer)
            rows[kind].append({"ttft": answer.ttft, **{k: found.get(k, 0) for k in ("cached", "fetched")}})
    return rows


def compared(name: str, rows: dict[str, list[Rows]]) -> Rows:
    """Medians, and of each round the ratio; those that were computed though another instance had them are
    counted and left out."""
    pairs = [(f, c) for f, c in zip(rows["fetched"], rows["computed"], strict=True) if f["fetched"]]
    medians = {kind: statistics.median(row["ttft"] for row in of) for kind, of in rows.items()}
    said = ", ".join(f"{kind} {1e3 * value:.1f} ms" for kind, value in medians.items())
    print(f"  {name}: {said}; fetched {len(pairs)} of {len(rows['fetched'])}", flush=True)
    ratios = [f["ttft"] / c["ttft"] for f, c in pairs]
    if ratios:
        each = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"    fetched over computed: {statistics.median(ratios):.3f} of {each}", flush=True)
    return {"median_ttft": medians, "ratios": ratios, "rounds": rows}


async def link(url: str) -> Rows:
    """Fetched and computed, on a P-heavy and on a D-heavy instance."""
    rows: Rows = {}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await moved(client)
        names = [i["name"] for i in state(url)["instances"]]
        holder = names[-1]
        for target in names[: max(1, INSTANCES // 2)]:
            for size in SIZES:
                name = f"{size} tokens on {target}"
                rows[name] = compared(name, await rounds(client, holder, target, size))
    return rows


async def moved(client: httpx.AsyncClient) -> None:
    """The server learns what moving KV takes from moves; what is compiled once is compiled."""
    names = [i["name"] for i in (await client.get("/taichi/state")).json()["instances"]]
    size = SIZES[0]
    for number in range(4 if REHEARSAL else 8):
        job = bodies(1, size, 2 * size, (100, 100), seed=number)[0]
        await stream(client, PATH, job, Mover(client, [20, 50], names, number))


def linked(out: Path) -> Rows:
    """The stage `link`."""
    with ours("fetch", out, "link", PATIENT) as url:
        return asyncio.run(link(url))


# ------------------------------------------------------------------------------------------ conversations


@contextlib.contextmanager
def ours(prefixes: str, out: Path, name: str, slo: SLO = TRAFFIC.slo) -> Iterator[str]:
    """Our server; what it logged is shown where a measurement fails."""
    log = out / f"prefix-{name}.log"
    model = cached_tiny_model() if REHEARSAL else shape(cached_tiny_model(), QWEN_7B, Path("/tmp/taichi-7b"))
    with serving(model, 8204, log, *our_flags(prefixes, slo)) as url:
        try:
            assert state(url)["prefixes"] == prefixes, state(url)["prefixes"]
            yield url
        except BaseException:
            tail(log)
            raise


def conversed(prefixes: str, out: Path) -> Rows:
    """The stages `blind`, `known` and `fetch`."""
    with ours(prefixes, out, prefixes) as url:
        asyncio.run(warmed(url))
        row = converse([url], "m", TRAFFIC, SEED)
        return row | {"moves": state(url)["moves"]}


async def warmed(url: str) -> None:
    """As `moved`; its moves are all that the predictor knows of the link."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await moved(client)


def stock(out: Path) -> Rows:
    """As many servers of vLLM's own, each request to the next."""
    model = cached_tiny_model() if REHEARSAL else shape(cached_tiny_model(), QWEN_7B, Path("/tmp/taichi-7b"))
    chunk = ["--max-num-batched-tokens", "2048", "--max-num-seqs", "256", "--served-model-name", "m"]
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                vllm(model, 8210 + number, out / f"prefix-stock-{number}.log", [*engine_flags(), *chunk])
            )
            for number in range(INSTANCES)
        ]
        urls = [ready(process, url, log) for process, url, log in servers]
        for url in urls:
            asyncio.run(compiled(url))
        return converse(urls, "m", TRAFFIC, SEED)


async def compiled(url: str) -> None:
    """What is compiled once is compiled."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for job in bodies(4, SIZES[0] // 2, SIZES[0], (50, 50), seed=3):
            await stream(client, PATH, job)


# Stages in the order of their worth, with the seconds that one takes at most, about.
LOAD = (TRAFFIC.counted + TRAFFIC.warm_up) / RATE + 40
STAGES = {
    "link": (linked, 220.0),
    "fetch": (lambda out: conversed("fetch", out), 80.0 + LOAD),
    "blind": (lambda out: conversed("blind", out), 80.0 + LOAD),
    "known": (lambda out: conversed("known", out), 80.0 + LOAD),
    "stock": (stock, 100.0 + LOAD),
}


def main() -> int:
    """The stages named after the directory, or all; 3 where some are left for another call."""
    out, began = out_directory(), time.monotonic()
    left = []
    for name in sys.argv[2:] or STAGES:
        stage, seconds = STAGES[name]
        path = out / f"prefix-{name}.json"
        if path.exists():
            print(f"{name}: {path.name} is there")
            continue
        if time.monotonic() - began + seconds > ENOUGH:
            left.append(name)
            continue
        print(f"{name}:", flush=True)
        row = stage(out)
        path.with_suffix(".part").write_text(json.dumps(row, indent=1))
        path.with_suffix(".part").rename(path)
        if "cached" in row:
            print(f"  {words(row)}", flush=True)
    print(
        f"{time.monotonic() - began:.0f} s" + (f"; left for another call: {' '.join(left)}" if left else "")
    )
    return 3 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
