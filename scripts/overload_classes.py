"""TTFT against TPOT of two classes past the goodput, as a picture: docs/img/overload-classes.png.

    python scripts/overload_classes.py [--rate 30] [--requests 3000] [--seed 1]

Chats on Qwen2.5-14B (2P2D of A100, chunks 1024 and 256), half of them strict (1 s, 40 ms) and half loose
(10 s, 200 ms), simulated with `serve` and with `demote`. Printed is the attainment of each class.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from overload_fates import Fate, Watch

from taichi_serve.bench.figure import figure, save
from taichi_serve.bench.mix import Mix, Part
from taichi_serve.bench.workload import workload
from taichi_serve.cluster.base import run
from taichi_serve.latency.shipped import machine
from taichi_serve.scheduling.policy import DEMOTE, SERVE, Policy
from taichi_serve.search.goodput import Scene
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

PICTURE = Path(__file__).parent.parent / "docs/img/overload-classes.png"
STRICT, LOOSE = Part("strict", SLO(1.0, 0.04)), Part("loose", SLO(10.0, 0.2))
SLIDERS = Sliders(2, 2, 1024, 256)
INK = {"strict": "#c44e52", "loose": "#4c72b0"}


def of(fates: Sequence[Fate], part: Part) -> tuple[list[tuple[float, float]], float]:
    """Where the requests of a class lie that were served (TTFT and TPOT, s), and how many of them are good,
    of all that came."""
    these = [fate for fate in fates if fate.slo_class == part.name]
    points = [(fate.ttft, fate.tpot) for fate in these if fate.ttft is not None and fate.tpot is not None]
    return points, fmean(fate.good(part.slo) for fate in these)


def simulated(mode: str, rate: float, requests: int, seed: int) -> list[Fate]:
    """One run to its end."""
    found = machine("qwen2.5-14b-tp1-a100")
    limit = min(found.max_model_len, found.kv_capacity)
    scene = Scene(found, workload("sharegpt", limit, mix=Mix((STRICT, LOOSE))), STRICT.slo)
    cluster = scene.cluster(SLIDERS, rate, requests, seed)
    watch = Watch(scene.scheduler(SLIDERS, replace(Policy(), overload=mode), cluster.capacities))
    run(watch, cluster)
    return [*watch.fates.values()]


def draw(panel: Any, mode: str, fates: Sequence[Fate]) -> None:
    """One mode: a point for each request that was served, a dashed corner for each SLO."""
    said = []
    for part in (LOOSE, STRICT):
        points, good = of(fates, part)
        ink = INK[part.name]
        panel.scatter(*zip(*((a, b * 1e3) for a, b in points), strict=True), s=4, alpha=0.5, color=ink)
        panel.plot(
            [part.slo.ttft] * 2 + [1e-3], [0.1] + [part.slo.tpot * 1e3] * 2, "--", linewidth=0.8, color=ink
        )
        said.append(f"{part.name} {good:.0%}")
    panel.set(xscale="log", xlim=(0.05, 20), ylim=(0, 220), xlabel="TTFT (s)")
    panel.set_title(f"{mode}: good of {', of '.join(reversed(said))}", fontsize=9)
    print(mode, ", ".join(said))


def main() -> None:
    """Run both, and draw them."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rate", type=float, default=30.0, help="requests/s")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    made, panels = figure(2)
    for panel, mode in zip(panels, (SERVE, DEMOTE), strict=True):
        draw(panel, mode, simulated(mode, args.rate, args.requests, args.seed))
    panels[0].set_ylabel("TPOT (ms)")
    save(made, PICTURE)


if __name__ == "__main__":
    main()
