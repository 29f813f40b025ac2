"""Ours against stock vLLM on the same GPUs: both servers up, loaded in turn with the same requests.

    scripts/gpu.sh versus [out-dir] [--first auto] [--second stock:256] [--workload 3658/100] [--slo 2,0.018] ...

A contender is `stock:CHUNK` (vLLM's own server with --data-parallel-size and --max-num-batched-tokens),
`nixl:CHUNK` (two of vLLM's own servers, one prefills and one decodes, over NIXL, behind a proxy as vLLM
documents it), `auto[:FLAGS]` (ours, which sets its sliders itself) or `ours:FLAGS` (ours with these flags of
`taichi serve`). Each looks for its goodput by bisection of its own, and they take turns, so that a card that
grows hot or a host that grows busy is the same for both. Every visit is a line of OUT/versus.jsonl; what is
there is not run again, and no visit is begun that would not end in time, so the same command goes on with the
rest. The last thing printed is the table. With TAICHI_REHEARSAL=1 all of it runs on a CPU with a tiny model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from common import NO_WEIGHTS, QWEN_7B, QWEN_14B, keep_logs, launched, ready, shape, tail, vllm

from taichi_serve.bench.bracket import Bracket
from taichi_serve.bench.client import MANY
from taichi_serve.bench.endpoint import Endpoint
from taichi_serve.bench.goodput import wilson
from taichi_serve.bench.openloop import OpenLoop, Plan
from taichi_serve.bench.score import Score
from taichi_serve.bench.workload import workload
from taichi_serve.slo import SLO
from taichi_serve.tiny import cached_tiny_model

REHEARSAL = bool(os.environ.get("TAICHI_REHEARSAL"))
SHAPES = {"7b": QWEN_7B, "14b": QWEN_14B}
SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]
LIMIT = 4096 if REHEARSAL else 16384
ATTAINMENT = 0.9
Row = dict[str, Any]


@dataclass(frozen=True)
class Beds:
    """What both contenders stand on."""

    model: Path
    gpus: int
    flags: tuple[str, ...]
    slo: SLO


def bed(args: argparse.Namespace, slo: SLO) -> Beds:
    """The model and the flags that all servers have in common."""
    limits = ("--max-model-len", str(LIMIT), "--max-num-seqs", "128", "--served-model-name", "m")
    if REHEARSAL:
        more = ("--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20))
        return Beds(cached_tiny_model(), 2, (*limits, *more), slo)
    graphs = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": SIZES}
    # Two servers are on each card and see each other's memory: they are told what is theirs.
    memory = ("--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", args.kv)
    model = shape(cached_tiny_model(), SHAPES[args.shape], Path("/tmp") / f"taichi-{args.shape}")
    return Beds(
        model, args.gpus, (*limits, *memory, *NO_WEIGHTS, "--compilation-config", json.dumps(graphs)), slo
    )


# -------------------------------------------------------------------------------------------- contenders


@contextlib.contextmanager
def contender(name: str, port: int, beds: Beds, out: Path) -> Iterator[tuple[list[int], str]]:
    """Start one; its processes and its URL, which answers when `ready` says so."""
    kind, _, words = name.partition(":")
    log = out / f"versus-{name.split()[0].replace(':', '-')}.log"
    if kind == "stock":
        parallel = ["--data-parallel-size", str(beds.gpus)]
        flags = [*beds.flags, *parallel, "--max-num-batched-tokens", words]
        with vllm(beds.model, port, log, flags) as (process, url, _):
            yield [process.pid], ready(process, url, log)
        return
    slo = ["--ttft-slo", f"{beds.slo.ttft:g}", "--tpot-slo", f"{beds.slo.tpot:g}"]
    split = (
        []
        if "--d-heavy" in words
        else ["--p-heavy", str(beds.gpus // 2), "--d-heavy", str(-(-beds.gpus // 2))]
    )
    devices = [] if REHEARSAL else ["--devices", ";".join(str(n) for n in range(beds.gpus))]
    tuned = ["--autotune", "on"] if kind == "auto" else []
    flags = [*split, *devices, *slo, *tuned, *beds.flags, *shlex.split(words)]
    with launched(beds.model, port, log, *flags) as (process, url):
        yield [process.pid], ready(process, url, log)


# ------------------------------------------------------------------------------------------------ visits


class Meters:
    """Joules of all cards and processor seconds of a server, between two looks."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._before = self._read()

    def _read(self) -> tuple[float, float]:
        return energy(), sum(family(pid) for pid in self._pids)

    def read(self) -> Row:
        """Since it was made; `joules` None where the cards do not say."""
        joules, cpu = (now - before for now, before in zip(self._read(), self._before, strict=True))
        return {"joules": joules or None, "cpu": cpu}


def family(pid: int) -> float:
    """Processor seconds of a process and all below it."""
    this = psutil.Process(pid)
    return sum(t.user + t.system for p in (this, *this.children(recursive=True)) for t in [p.cpu_times()])


def energy() -> float:
    """Joules that all cards have used, 0.0 where nobody says."""
    if REHEARSAL:
        return 0.0
    from vllm.third_party import pynvml

    pynvml.nvmlInit()
    cards = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
    return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(card) for card in cards) / 1e3


async def visit(url: str, pids: list[int], args: argparse.Namespace, slo: SLO, rate: float, seed: int) -> Row:
    """One rate and seed, until the outcome is certain or, with --full, to the end."""
    requests = max(args.requests, int(args.least * rate))
    async with httpx.AsyncClient(
        base_url=url, timeout=httpx.Timeout(None, connect=30.0), limits=MANY
    ) as client:
        score = Score(slo, requests, ATTAINMENT)
        plan = Plan.of(workload(args.workload, LIMIT), rate, args.warm_up, requests, seed)
        meters, began = Meters(pids), time.perf_counter()
        loop = OpenLoop(Endpoint(client, "m", LIMIT, ""), salt=seed)
        await loop.run(plan, score, not args.full, lambda _: None)
        run = score.run(rate, time.perf_counter() - began)
        row: Row = {"rate": rate, "seed": seed, "sent": run.sent, "total": requests, "good": run.good}
        row |= {
            "bad": run.bad,
            "kept": run.kept,
            "failed": run.failed,
            "seconds": run.seconds,
            **meters.read(),
        }
        for name in ("ttft", "tpot"):
            row[name] = [run.quantile(name, share) for share in (0.5, 0.9)]
        state = await client.get("/taichi/state")
        if state.status_code == 200:
            row["moves"], row["sliders"] = state.json()["moves"], state.json()["sliders"]
    return row


class Book:
    """The lines of all visits."""

    def __init__(self, path: Path, setting: Row) -> None:
        self._path, self._setting = path, setting
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        self.rows = [row for row in rows if row["setting"] == setting]

    def add(self, row: Row) -> None:
        """One visit more."""
        self.rows.append(row | {"setting": self._setting})
        with self._path.open("a") as out:
            out.write(json.dumps(self.rows[-1]) + "\n")

    def of(self, name: str) -> list[Row]:
        """All visits of a contender."""
        return [row for row in self.rows if row["contender"] == name]


def following(rows: list[Row], start: float, tolerance: float, seeds: list[int]) -> tuple[float, int] | None:
    """The rate and the seed to try next; None when it is known. A rate counts when every seed kept it; the
    first that misses it decides."""
    bracket = Bracket(start, tolerance)
    for rate in dict.fromkeys(row["rate"] for row in rows):
        tried = {row["seed"]: row["kept"] for row in rows if row["rate"] == rate}
        if all(tried.values()) and len(tried) < len(seeds) and rate > bracket.low:
            return rate, next(seed for seed in seeds if seed not in tried)
        bracket = bracket.after(rate, all(tried.values()))
    rate = bracket.next()
    return None if rate is None else (rate, seeds[0])


# ----------------------------------------------------------------------------------------------- the table


def line(name: str, rows: list[Row], seeds: list[int]) -> str:
    """Its goodput, and what was seen there."""
    whole: dict[float, list[Row]] = {}
    for row in rows:
        whole.setdefault(row["rate"], []).append(row)
    kept = [rate for rate, of in whole.items() if all(r["kept"] for r in of) and len(of) == len(seeds)]
    missed = min((row["rate"] for row in rows if not row["kept"]), default=None)
    if not kept:
        return f"{name:30} none kept by {len(seeds)} seeds; missed at {missed}"
    there = whole[max(kept)]
    good, sent = sum(r["good"] for r in there), sum(r["good"] + r["bad"] for r in there)
    low, high = wilson(good, sent)
    ttft, tpot = (there[0][key] for key in ("ttft", "tpot"))
    power = [r["joules"] / r["good"] for r in there if r["joules"]]
    more = f", {sum(power) / len(power):.0f} J a good request" if power else ""
    return (
        f"{name:30} {max(kept):.3g}/s, missed at {missed and round(missed, 2)}; {good / sent:.1%} "
        f"({low:.1%} to {high:.1%}) of {sent}; TTFT {ttft} s, TPOT {tpot} s, "
        f"{sum(r['cpu'] for r in there) / sum(r['seconds'] for r in there):.2f} cores{more}"
    )


def main() -> int:
    """3 where something is left for another call."""
    args, began = parsed(), time.monotonic()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    slo = SLO(*(float(word) for word in args.slo.split(",")))
    seeds, names = [int(word) for word in args.seeds.split(",")], [args.first, args.second]
    book = Book(out / "versus.jsonl", {"workload": args.workload, "slo": args.slo, "gpus": args.gpus})
    beds, open_ = bed(args, slo), True
    with contextlib.ExitStack() as stack:
        starting = [contender(name, 8301 + n, beds, out) for n, name in enumerate(names) if name]
        up = {name: stack.enter_context(one) for name, one in zip(names, starting, strict=False)}
        print(f"up after {time.monotonic() - began:.0f} s: {', '.join(up)}", flush=True)
        while open_ and time.monotonic() - began < args.seconds:
            open_ = False
            for name, (pids, url) in up.items():
                todo = following(book.of(name), args.start, args.tolerance, seeds)
                if todo is None:
                    continue
                open_ = True
                rate, seed = todo
                if time.monotonic() - began + max(args.requests / rate, args.least) + 10 > args.seconds:
                    return _end(book, names, seeds, out, 3)
                row = asyncio.run(visit(url, pids, args, slo, rate, seed)) | {"contender": name}
                book.add(row)
                print(json.dumps({k: v for k, v in row.items() if k != "moves"}), flush=True)
    return _end(book, names, seeds, out, 3 if open_ else 0)


def _end(book: Book, names: list[str], seeds: list[int], out: Path, status: int) -> int:
    for name in names:
        print(line(name, book.of(name), seeds))
    keep_logs(out)
    return status


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", default=Path(os.environ.get("OUT", "/tmp/taichi-gpu")))
    parser.add_argument("--first", default="auto")
    parser.add_argument("--second", default="stock:256")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="14b")
    parser.add_argument("--kv", default="9G", help="of each instance")
    parser.add_argument("--workload", default="3658/100")
    parser.add_argument("--slo", default="2,0.018", help="TTFT and TPOT in seconds")
    parser.add_argument("--start", type=float, default=6.0, help="first rate, requests/s")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--requests", type=int, default=600, help="of a visit, at least")
    parser.add_argument("--least", type=float, default=60.0, help="seconds of a visit, at least")
    parser.add_argument("--warm-up", type=int, default=40)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--full", action="store_true", help="no visit ends early")
    parser.add_argument("--seconds", type=float, default=520.0, help="of this call")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
