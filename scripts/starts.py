"""What a server without sliders carries before it has seen anything (decision 143), in simulation.

    python scripts/starts.py [PROFILE] [--instances 2,4,8]

For each workload, SLO and number of instances: the sliders of the start, and their goodput (requests/s, two
seeds, to 4 %) while they stand still.
"""

from __future__ import annotations

import argparse
import math

from taichi_serve.bench.workload import workload
from taichi_serve.latency.shipped import Machine, machine
from taichi_serve.search.goodput import TARGET, Contender, Scene, attain
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO
from taichi_serve.tuning.fluid import Fluid

LONG, CHAT = "3658/100", "661/257"
ASKED = (
    *((LONG, SLO(1.5, 0.030)), (LONG, SLO(2.0, 0.018)), (LONG, SLO(2.0, 0.014))),
    *((CHAT, SLO(1.0, 0.015)), (CHAT, SLO(1.5, 0.030))),
)
REQUESTS = {LONG: 100, CHAT: 200}  # of each instance and seed
SEEDS = (0, 1)
SEQS, P_CHUNK, NEAR, STEP = 256, 8192, 1.04, 1.25


def goodput(scene: Scene, sliders: Sliders, requests: int) -> float:
    """Requests/s of these sliders, by bisection; 0 where they carry less than a tenth."""

    def kept(rate: float) -> bool:
        runs = [
            attain(scene, Contender("start", sliders), rate, requests, seed, target=TARGET) for seed in SEEDS
        ]
        return sum(run.good for run in runs) >= TARGET * requests * len(SEEDS)

    low, high = 0.0, math.inf
    rate = 4.0 * sliders.instances
    while high > NEAR * low and rate > 0.1:
        low, high = (rate, high) if kept(rate) else (low, rate)
        rate = low * STEP if high == math.inf else high / STEP if not low else math.sqrt(low * high)
    return low


def started(known: Machine, slo: SLO, instances: int) -> Sliders | None:
    """The sliders of a start on these devices."""
    return Fluid(known.truth, slo, SEQS, known.kv_capacity).suited(instances, P_CHUNK)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profile", nargs="?", default="qwen2.5-14b-tp1-h200-measured")
    parser.add_argument("--instances", default="2,4,8")
    args = parser.parse_args()
    known = machine(args.profile)
    for name, slo in ASKED:
        for instances in map(int, args.instances.split(",")):
            sliders = started(known, slo, instances)
            what = f"{name}, {slo.ttft:g} s and {slo.tpot * 1e3:g} ms, {instances} instances"
            if sliders is None:
                print(f"{what}: no sliders carry it", flush=True)
                continue
            scene = Scene(known, workload(name, P_CHUNK), slo)
            found = goodput(scene, sliders, REQUESTS[name] * instances)
            told = f"{sliders.p_heavy}P{sliders.d_heavy}D, S_D {sliders.d_chunk}"
            print(f"{what}: {told}: {found:.2f} requests/s", flush=True)


if __name__ == "__main__":
    main()
