"""TTFT against TPOT of two classes past the goodput, as a picture: docs/img/overload-classes.png.

    python scripts/overload_classes.py [--rate 30] [--requests 3000] [--seed 1]

Chats on Qwen2.5-14B (2P2D of A100, chunks 1024 and 256), half of them strict (1 s, 40 ms) and half loose
(10 s, 200 ms), simulated with `serve` and with `demote`. Printed is the attainment of each class.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from taichi_serve.bench.figure import figure, save
from taichi_serve.bench.mix import Mix, Part
from taichi_serve.bench.workload import workload
from taichi_serve.cluster.base import run
from taichi_serve.latency.shipped import machine
from taichi_serve.messages import Arrived, Command, Event, Finished, Outcome, Prefilled
from taichi_serve.scheduling.policy import DEMOTE, SERVE, Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.search.goodput import Scene
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO, tpot

PICTURE = Path(__file__).parent.parent / "docs/img/overload-classes.png"
STRICT, LOOSE = Part("strict", SLO(1.0, 0.04)), Part("loose", SLO(10.0, 0.2))
SLIDERS = Sliders(2, 2, 1024, 256)
INK = {"strict": "#c44e52", "loose": "#4c72b0"}


@dataclass
class Seen:
    """Stands before a scheduler; of every request its class, SLO, arrival, first token and end (s)."""

    inner: GlobalScheduler
    came: dict[str, Arrived] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    each: dict[str, tuple[float, float]] = field(default_factory=dict)  # TTFT and TPOT of those served

    def on(self, event: Event) -> Sequence[Command]:
        """Note it, and pass it on."""
        if isinstance(event, Arrived):
            self.came.setdefault(event.request, event)
        elif isinstance(event, Prefilled):
            self.first.setdefault(event.request, event.at)
        elif isinstance(event, Finished) and event.outcome is Outcome.FINISHED:
            first = self.first[event.request]
            waited = first - self.came[event.request].at
            self.each[event.request] = waited, tpot(first, event.at, event.output_tokens)
        return self.inner.on(event)

    def of(self, part: Part) -> tuple[list[tuple[float, float]], float]:
        """Where the requests of a class lie, and how many of them are good, of all that came."""
        names = [name for name, came in self.came.items() if came.slo_class == part.name]
        points = [self.each[name] for name in names if name in self.each]
        return points, sum(part.slo.good(*point) for point in points) / len(names)


def simulated(mode: str, rate: float, requests: int, seed: int) -> Seen:
    """One run to its end."""
    found = machine("qwen2.5-14b-tp1-a100")
    limit = min(found.max_model_len, found.kv_capacity)
    scene = Scene(found, workload("sharegpt", limit, mix=Mix((STRICT, LOOSE))), STRICT.slo)
    cluster = scene.cluster(SLIDERS, rate, requests, seed)
    seen = Seen(scene.scheduler(SLIDERS, replace(Policy(), overload=mode), cluster.capacities))
    run(seen, cluster)
    return seen


def draw(panel: Any, mode: str, seen: Seen) -> None:
    """One mode: a point for each request that was served, a dashed corner for each SLO."""
    said = []
    for part in (LOOSE, STRICT):
        points, good = seen.of(part)
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
