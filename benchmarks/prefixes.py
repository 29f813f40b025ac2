"""What knowing prefix caches is worth: conversations on three real instances, and on stock vLLM, in turn.

    python benchmarks/prefixes.py [--pairs 5] [--requests 200] [--rate 3] [--kinds blind,known,...]

`blind`, `known` and `fetch` are `taichi serve --d-heavy 3 --prefixes ...`, `stock` is vLLM's own server with
`--data-parallel-size 3`, and `one` is one instance with three times the KV: what caches could have at most.
KV is so small that caches overflow. The chunk is the whole step budget, and both servers have the same one.
Three instances share the two cores that a run gets; instance 0 and 2 the first of them.

All servers are up, all but one of them idle. A round sends the same conversations (the seed is the round's)
to every kind, and which comes first goes round. A measurement waits until the rest of the machine is quiet; a
round during which others used more than `--others` cores is measured again. Printed are the shares of prompt
tokens that were cached, what was predicted against what was found, median TTFTs, and ratios round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from conversing import Traffic, converse, words
from overhead import Stock
from paired import Watch, wait_for_quiet
from servers import Server

from taichi_serve.slo import SLO

INSTANCES = 3
BUDGET = 512  # tokens a step
BYTES = 2048  # of KV a token, tiny model in float32
KINDS = ("blind", "known", "fetch", "stock", "one")
TALKS = "conversations:share=0.8,turns=6,think=5,system=500,message=60,answer=60,result=100,call=20"
# Numerator, denominator, and the most that the median of their ratios of median TTFTs is to be.
COMPARED = (
    ("fetch", "blind", 0.6),
    ("fetch", "stock", 0.8),
    ("fetch", "known", None),
    ("known", "blind", None),
)
NEAR = 0.05  # of all prompt tokens, that the cached ones may be fewer than those of `one`
EXACT = 0.02  # of the cached tokens that were found, that were predicted wrongly
Row = dict[str, Any]


def start(kind: str, kv_tokens: int, directory: Path) -> Server | Stock:
    """A server of this kind, starting."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    where = [str(cores[number % len(cores)]) for number in range(INSTANCES)]
    common = (
        "--max-num-batched-tokens",
        str(BUDGET),
        "--max-num-seqs",
        "256",
        "--enable-prompt-tokens-details",
    )
    each = ("--kv-cache-memory-bytes", str(kv_tokens * BYTES))
    if kind == "stock":
        bound = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(where)}
        return Stock(directory, "--data-parallel-size", str(INSTANCES), *common, *each, env=bound)
    chunk = ("--d-chunk", str(BUDGET), *common)
    if kind == "one":
        all_of_it = ("--kv-cache-memory-bytes", str(INSTANCES * kv_tokens * BYTES))
        return Server(directory, "--d-heavy", "1", "--devices", where[0], *chunk, *all_of_it)
    devices = ("--devices", ";".join(where), "--prefixes", kind)
    return Server(directory, "--d-heavy", str(INSTANCES), *devices, *chunk, *each)


def one(server: Server | Stock, traffic: Traffic, seed: int, others: float) -> Row:
    """A seed's conversations, and how many cores neither the server nor this process used meanwhile."""
    wait_for_quiet(others)
    watch, own, began = Watch(server.process.pid), os.times(), time.monotonic()
    row = converse([server.url], "tiny", traffic, seed)
    now, used = os.times(), watch.read()
    ours = (now.user + now.system - own.user - own.system) / (time.monotonic() - began)
    assert row["failed"] == 0, [sample[-1] for sample in row["samples"] if sample[-1]][:3]
    return row | {"cpu": used["cpu"], "others": used["others"] - ours}


def one_round(
    servers: Mapping[str, Server | Stock], traffic: Traffic, number: int, others: float, attempts: int = 5
) -> dict[str, Row]:
    """All kinds, one after the other, on a quiet machine."""
    kinds = list(servers)
    first = number % len(kinds)
    for attempt in range(attempts):
        rows: dict[str, Row] = {}
        for kind in kinds[first:] + kinds[:first]:
            # Tokens that were sent before are in a prefix cache: every attempt has others.
            rows[kind] = one(servers[kind], traffic, number * attempts + attempt, others)
            if (used := rows[kind]["others"]) > others:
                print(f"round {number + 1}  others used {used:.2f} cores: measured again", flush=True)
                break
        else:
            return rows
    raise AssertionError(f"the machine was not quiet in {attempts} attempts")


@contextlib.contextmanager
def running(kinds: Sequence[str], kv_tokens: int, warm: Traffic) -> Iterator[dict[str, Server | Stock]]:
    """Servers of these kinds, warm."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        servers: dict[str, Server | Stock] = {}
        for kind in kinds:  # one after the other: they would take the cores from each other
            servers[kind] = start(kind, kv_tokens, Path(name) / kind)
            stack.callback(servers[kind].end)
            servers[kind].wait_ready()
        for number, server in enumerate(servers.values()):
            converse([server.url], "tiny", warm, seed=100_000 + number)
        yield servers


def verdict(value: float, most: float | None) -> str:
    """What a bound says of a figure."""
    return "" if most is None else f"  {'within' if value <= most else 'MISSES'} {most:g}"


def report(rounds: Sequence[dict[str, Row]]) -> list[str]:
    """Lines: shares and medians of each kind, and ratios round by round."""
    kinds = rounds[0]
    said = []
    for kind in kinds:
        rows = [each[kind] for each in rounds]
        cached = statistics.median(row["cached"] for row in rows)
        ttft = 1e3 * statistics.median(row["ttft_p50"] for row in rows)
        said.append(f"{kind:6} cached {cached:.1%} of prompt tokens, median TTFT {ttft:.1f} ms")
        predicted, actual = (sum(row[of] for row in rows) for of in ("predicted", "actual"))
        if predicted and actual:
            off = abs(predicted - actual) / actual
            found = f"{predicted:.0f} of {actual:.0f} cached tokens"
            said[-1] += f", predicted {found}: {off:.2%} off{verdict(off, EXACT)}"
    for over, under, most in COMPARED:
        if over in kinds and under in kinds:
            ratios = [each[over]["ttft_p50"] / each[under]["ttft_p50"] for each in rounds]
            median, every = statistics.median(ratios), " ".join(f"{ratio:.3f}" for ratio in ratios)
            said.append(f"median TTFT, {over} over {under}: {median:.3f}{verdict(median, most)}  of {every}")
    for kind in kinds if "one" in kinds else ():
        less = statistics.median(each["one"]["cached"] - each[kind]["cached"] for each in rounds)
        bound = NEAR if kind == "fetch" else None
        said.append(
            f"cached, {kind} below one cache as large as all: {100 * less:.1f} points{verdict(less, bound)}"
        )
    return said


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="rounds, each with all kinds (default: 5)")
    parser.add_argument("--requests", type=int, default=200, help="requests that count (default: 200)")
    parser.add_argument("--rate", type=float, default=3.0, help="requests per second (default: 3)")
    parser.add_argument("--kv", type=int, default=16384, help="tokens of KV of an instance (default: 16384)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which (default: all)")
    parser.add_argument("--others", type=float, default=0.1, help="cores others may use (default: 0.1)")
    parser.add_argument("--json", type=Path, help="file that gets every figure")
    args = parser.parse_args()
    if unknown := set(args.kinds.split(",")) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))}: none of {', '.join(KINDS)}")
    return args


def main() -> None:
    args = arguments()
    traffic = Traffic(TALKS, args.rate, args.requests, args.requests // 5, 4096, SLO(4.0, 0.2))
    rounds: list[dict[str, Row]] = []
    with running(args.kinds.split(","), args.kv, replace(traffic, counted=20, warm_up=0)) as servers:
        for number in range(args.pairs):
            rounds.append(one_round(servers, traffic, number, args.others))
            for kind, row in rounds[-1].items():
                print(f"round {number + 1}  {kind:6} {words(row)}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(rounds))
        sent = f"{args.requests} requests at {args.rate:g}/s, {args.kv} tokens of KV each"
        print(f"\n{args.pairs} rounds of {sent}")
        print("\n".join(report(rounds)))


if __name__ == "__main__":
    main()
