"""What knowing prefix caches is worth: goodput by TTFT and share of prompt tokens that are not computed.

    PYTHONPATH=src python scripts/prefix.py TRACE [--requests 6000] [--only a100] [--json FILE]

TRACE is a file in Mooncake's format, played with its own arrivals, faster or slower. Eight instances of
Qwen2.5-14B, all alike; KV on the GPU only and with a tier in host memory; the scheduler blind, with prefixes
in its predictions, and with fetches. Beside that the share that one cache as large as all of them together
would have, which is the most that any placement can reach without more memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.workload import Workload, workload
from taichi_serve.latency.shipped import machine
from taichi_serve.scheduling.policy import PREFIXES, Policy
from taichi_serve.search.goodput import Contender, Scene, attain
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

LIMIT = 131_072  # tokens of prompt and output: the model with its context extended, as the trace needs it
INSTANCES = 8
CHUNK = 2048
ANY_TPOT = 10.0  # seconds: goodput is by TTFT alone
CELLS = {
    "a100": ("qwen2.5-14b-tp1-a100", 10.0, (0, 1_000_000, 2_000_000)),
    "h200": ("qwen2.5-14b-tp1-h200", 4.0, (0, 1_000_000, 2_000_000)),
}
POLICY = Policy(ttft_margin=1.0)


def scene(profile: str, ttft: float, host_kv: int, work: Workload, prefixes: str) -> Scene:
    """Eight of these machines."""
    found = replace(machine(profile), max_model_len=LIMIT)
    return Scene(found, work, SLO(ttft, ANY_TPOT), host_kv=host_kv, prefixes=prefixes)


def highest(made: Scene, requests: int, guess: float) -> dict[str, float]:
    """The highest rate at which 90 % are good, to 1 %, and what share of prompt tokens was cached there."""
    contender = Contender("alike", Sliders(0, INSTANCES, 0, CHUNK), POLICY)
    low, high, rate, step = 0.0, 0.0, guess, 1.15
    while not (low and high and high - low <= 0.01 * high):
        tally = attain(made, contender, rate, requests, 0)
        if tally.attainment >= 0.9:
            low, at_low = rate, tally
        else:
            high = rate
        rate = (low + high) / 2 if low and high else rate * step if low else rate / step
    return {
        "goodput": low,
        "hit": at_low.hit_ratio,
        "fetched": at_low.fetched_tokens / at_low.prompt_tokens,
        "ttft_p50": at_low.ttft.quantile(0.5),
        "ttft_p90": at_low.ttft.quantile(0.9),
    }


def one_cache(work: Workload, requests: int, tokens: int) -> float:
    """The share of prompt tokens that one cache of so many tokens has, the longest unused forgotten first."""
    size, room = work.block_size, tokens // work.block_size
    kept: OrderedDict[int, None] = OrderedDict()
    cached = total = 0
    for call in work.requests(1.0, requests, 0):
        most = (call.prompt_tokens - 1) // size
        there = next((n for n, b in enumerate(call.blocks[:most]) if b not in kept), most)
        cached, total = cached + there * size, total + call.prompt_tokens
        for block in reversed(call.blocks[: (call.prompt_tokens + call.output_tokens - 1) // size]):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > room:
            kept.popitem(last=False)
    return cached / total


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--only", choices=CELLS)
    parser.add_argument("--host", type=int, help="only this tier, in tokens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    work = workload(args.trace, LIMIT, over_limit="skip", arrivals=Arrivals("trace"))
    print(f"{args.requests} requests of {work.name}; {work.note}", flush=True)
    rows = []
    print(
        "| machine | host tier | one cache | knowing | goodput | hit | fetched | TTFT p50 | p90 |", flush=True
    )
    for name, (profile, ttft, tiers) in CELLS.items():
        for host in tiers if args.only in (None, name) else ():
            if args.host not in (None, host):
                continue
            kv = max(machine(profile).kv_capacity, host)
            ideal = one_cache(work, args.requests, INSTANCES * kv)
            guess = 3.0 if name == "a100" else 10.0
            for knowing in PREFIXES:
                began = time.perf_counter()
                row = highest(scene(profile, ttft, host, work, knowing), args.requests, guess)
                guess = row["goodput"]
                rows.append({"machine": name, "host": host, "ideal": ideal, "knowing": knowing, **row})
                print(
                    f"| {name} {ttft:g} s | {host:,} | {ideal:.1%} | {knowing} | {row['goodput']:.2f}/s "
                    f"| {row['hit']:.1%} | {row['fetched']:.1%} | {row['ttft_p50']:.2f} s "
                    f"| {row['ttft_p90']:.2f} s |  ({time.perf_counter() - began:.0f} s)",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
