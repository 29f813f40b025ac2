"""Attainment of large fleets in simulation, where everybody is asked and where a few are.

    PYTHONPATH=src python benchmarks/fleet.py --out fleet.jsonl            # 64, 256 and 1,000 instances
    PYTHONPATH=src python benchmarks/fleet.py --out fleet.jsonl --sizes 64 --rate 1.4

Each size is run twice with the same requests, once either way; a line is written for each run. A run that has
a line in the file already is not made again, so an interrupted table goes on where it stopped. `decisions` is
a hash of every decision in order: the same hash means the same choices.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taichi_serve.bench.goodput import Meter
from taichi_serve.bench.workload import workload
from taichi_serve.cluster.base import run
from taichi_serve.latency.shipped import machine
from taichi_serve.messages import Command, Event
from taichi_serve.scheduling.fleet import FEW
from taichi_serve.scheduling.policy import FETCH, Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.search.goodput import Scene
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

SIZES = 64, 256, 1_000
EVERYBODY = 1 << 30
WAYS = {"everybody": EVERYBODY, "a few": FEW}


class Noted:
    """A scheduler whose decisions are hashed, and the time that it takes is counted."""

    def __init__(self, scheduler: GlobalScheduler) -> None:
        self.scheduler = scheduler
        self.hash = hashlib.sha256()
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def on(self, event: Event) -> Sequence[Command]:
        """Decide, and note what."""
        began = time.thread_time()
        commands = self.scheduler.on(event)
        self.seconds += time.thread_time() - began
        for one in commands:
            place = getattr(one, "on", getattr(one, "to", ""))
            said = (type(one).__name__, getattr(one, "request", ""), place)
            self.hash.update(repr(said).encode())
        return commands


def simulated(size: int, way: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run: what became of its requests."""
    found = machine(args.profile)
    scene = Scene(
        found, workload(args.workload, found.max_model_len), SLO(args.ttft_slo, args.tpot_slo), prefixes=FETCH
    )
    high = size // 2
    sliders = Sliders(high, size - high, args.p_chunk, args.d_chunk)
    cluster = scene.cluster(sliders, args.rate * size, args.each * size, args.seed)
    scheduler = scene.scheduler(sliders, Policy(), cluster.capacities)
    scheduler._dispatcher.fleet.least = WAYS[way]
    noted = Noted(scheduler)
    meter = Meter(noted, scene.slo)  # type: ignore[arg-type]
    run(meter, cluster)
    tally = meter.tally
    return {
        "instances": size,
        "asked": way,
        "rate": args.rate * size,
        "requests": tally.sent,
        "attainment": tally.attainment,
        "seconds of deciding": round(noted.seconds, 2),
        "decisions": noted.hash.hexdigest()[:16],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The lines that are missing, each written and said as it is made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rate", type=float, default=1.4, help="requests/s for each instance")
    parser.add_argument("--each", type=int, default=20, help="requests for each instance")
    parser.add_argument("--workload", default="1200/100")
    parser.add_argument("--profile", default="qwen2.5-14b-tp1-a100")
    parser.add_argument("--ttft-slo", type=float, default=2.0)
    parser.add_argument("--tpot-slo", type=float, default=0.05)
    parser.add_argument("--p-chunk", type=int, default=1024)
    parser.add_argument("--d-chunk", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(row["instances"], row["asked"], row["rate"], row["requests"]) for row in map(json.loads, lines)}
    for size in args.sizes:
        for way in WAYS:
            if (size, way, args.rate * size, args.each * size) in done:
                continue
            row = simulated(size, way, args)
            with args.out.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
