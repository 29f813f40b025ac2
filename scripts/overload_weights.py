"""What classes with weights get past the goodput, as told in docs/overload.md ("Classes with weights").

    python scripts/overload_weights.py [--tpot 0.04] [--rate 60] [--seeds 1 2 3] [--modes demote]

Chats on Qwen2.5-14B (2P2D of A100, chunks 1024 and 256), three classes of equally many requests with weights
1, 2 and 4, all with a TTFT SLO of 1 s, simulated with `--fair-classes`. For each mode and seed: the share of
each class of the prompt tokens that were computed in time, and of all requests those that were good.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import fmean

from overload_fates import Watch

from taichi_serve.bench.mix import Mix, Part
from taichi_serve.bench.workload import workload
from taichi_serve.cluster.base import run
from taichi_serve.latency.shipped import machine
from taichi_serve.scheduling.policy import DEMOTE, OVERLOAD, REFUSE, Policy
from taichi_serve.search.goodput import Scene
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

SLIDERS = Sliders(2, 2, 1024, 256)
WEIGHTS = {"light": 1.0, "middle": 2.0, "heavy": 4.0}


def shares(mode: str, slo: SLO, rate: float, requests: int, seed: int) -> tuple[list[float], float]:
    """One run to its end: the share of each class, and of good requests."""
    found = machine("qwen2.5-14b-tp1-a100")
    mix = Mix(tuple(Part(name, slo, weight=weight) for name, weight in WEIGHTS.items()))
    scene = Scene(found, workload("sharegpt", min(found.max_model_len, found.kv_capacity), mix=mix), slo)
    cluster = scene.cluster(SLIDERS, rate, requests, seed)
    watch = Watch(scene.scheduler(SLIDERS, replace(Policy(), overload=mode, fair=True), cluster.capacities))
    run(watch, cluster)
    tokens = dict.fromkeys(WEIGHTS, 0)
    for fate in watch.fates.values():
        if fate.ttft is not None and fate.ttft <= slo.ttft:
            tokens[fate.slo_class or ""] += fate.prompt
    whole = sum(tokens.values())
    return [n / whole for n in tokens.values()], fmean(fate.good(slo) for fate in watch.fates.values())


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tpot", type=float, default=0.04, help="TPOT SLO (s)")
    parser.add_argument("--rate", type=float, default=60.0, help="requests/s")
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--modes", nargs="+", choices=OVERLOAD, default=[DEMOTE, REFUSE])
    args = parser.parse_args()
    whole = sum(WEIGHTS.values())
    print("weights", ", ".join(f"{weight / whole:.1%}" for weight in WEIGHTS.values()))
    for mode in args.modes:
        for seed in args.seeds:
            had, good = shares(mode, SLO(1.0, args.tpot), args.rate, args.requests, seed)
            print(mode, seed, ", ".join(f"{share:.1%}" for share in had), f"good {good:.1%}", flush=True)


if __name__ == "__main__":
    main()
