"""Attainment past goodput: what --overload serve, demote and refuse make of 0.9 to 2 times the goodput.

    scripts/compile.sh
    PYTHONPATH=build/compiled python scripts/overload.py [--seeds 1 2] [--setting NAME] [--cv 2]

The settings are hybrids of docs/paper.md, tuned there. Own goodput is that of `serve`, on the same seeds: the
highest rate at which 90 % of all requests sent are good. At each multiple of it stand, for each mode: the
share of all requests that are good, good requests/s over the time in which requests came, the p99 of the TTFT
of those served over the TTFT SLO, the share that was refused, and attainment by quartile of prompt length,
shortest first. With --json FILE the figures are kept.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import Pool
from pathlib import Path
from statistics import fmean
from typing import Any

from taichi_serve.bench.arrivals import GAMMA, Arrivals
from taichi_serve.bench.bracket import Bracket
from taichi_serve.bench.workload import workload
from taichi_serve.cluster.base import run
from taichi_serve.latency.shipped import machine
from taichi_serve.messages import Arrived, Command, Event, Finished, Outcome, Prefilled
from taichi_serve.scheduling.policy import OVERLOAD, SERVE, Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.search.goodput import TARGET, Contender, Scene, attain
from taichi_serve.search.interval import interval
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO, tpot

LOADS = (0.9, 1.0, 1.1, 1.25, 1.5, 2.0)  # times own goodput
TOLERANCE = 0.01  # of a goodput


@dataclass(frozen=True)
class Setting:
    """A hybrid of docs/paper.md and its goodput there (requests/s), where the search for it begins."""

    profile: str
    load: str
    slo: SLO
    contender: Contender
    guess: float

    def scene(self, cv: float) -> Scene:
        """What it runs on, with gaps between arrivals of this coefficient of variation."""
        found = machine(self.profile)
        limit = min(found.max_model_len, found.kv_capacity)
        return Scene(found, workload(self.load, limit, arrivals=Arrivals(GAMMA, cv)), self.slo)


def hybrid(p_heavy: int, d_heavy: int, d_chunk: int, margin: float) -> Contender:
    """As tuned for docs/paper.md."""
    sliders = Sliders(p_heavy, d_heavy, 8192, d_chunk)
    return Contender(f"{p_heavy}P{d_heavy}D", sliders, Policy(ttft_margin=margin))


A14, B32 = "qwen2.5-14b-tp1-a100", "qwen2.5-32b-tp2-a100"
SETTINGS = {
    "14b-6s-50ms": Setting(A14, "summarization", SLO(6, 0.05), hybrid(5, 3, 96, 0.5), 6.26),
    "14b-4s-70ms": Setting(A14, "summarization", SLO(4, 0.07), hybrid(4, 4, 256, 0.3), 6.17),
    "32b-4s-70ms": Setting(B32, "summarization", SLO(4, 0.07), hybrid(3, 1, 128, 0.3), 2.63),
    "32b-6s-50ms": Setting(B32, "summarization", SLO(6, 0.05), hybrid(3, 1, 64, 0.5), 2.77),
    "chat-14b-4s-70ms": Setting(A14, "sharegpt", SLO(4, 0.07), hybrid(4, 4, 32, 0.5), 58.3),
    "chat-32b-4s-70ms": Setting(B32, "sharegpt", SLO(4, 0.07), hybrid(2, 2, 64, 0.5), 25.0),
}
THREE = ("14b-6s-50ms", "14b-4s-70ms", "32b-4s-70ms")


@dataclass(slots=True)
class Fate:
    """A request: when it came (s), its prompt tokens, its TTFT (s; None: no token), and what became of it."""

    at: float
    prompt: int
    ttft: float | None = None
    good: bool = False
    refused: bool = False


@dataclass
class Watch:
    """Stands before a scheduler, and notes what becomes of every request."""

    inner: GlobalScheduler
    slo: SLO
    fates: dict[str, Fate] = field(default_factory=dict)

    def on(self, event: Event) -> Sequence[Command]:
        """Note it, and pass it on."""
        if isinstance(event, Arrived):
            self.fates.setdefault(event.request, Fate(event.at, event.prompt_tokens))
        elif isinstance(event, Prefilled):
            fate = self.fates[event.request]
            fate.ttft = event.at - fate.at if fate.ttft is None else fate.ttft
        elif isinstance(event, Finished):
            fate = self.fates[event.request]
            fate.refused = event.outcome is Outcome.REFUSED
            if event.outcome is Outcome.FINISHED and fate.ttft is not None:
                each = tpot(fate.at + fate.ttft, event.at, event.output_tokens)
                fate.good = self.slo.good(fate.ttft, each)
        return self.inner.on(event)


@dataclass(frozen=True)
class Figures:
    """One run: shares of all requests sent, good requests/s, and the p99 TTFT of the served over the SLO."""

    attainment: float
    good: float
    wait: float
    refused: float
    best_effort: float
    quartiles: tuple[float, ...]


def figures(fates: Sequence[Fate], best_effort: int, slo: SLO) -> Figures:
    """From what became of every request."""
    sent = len(fates)
    waits = sorted(fate.ttft for fate in fates if fate.ttft is not None)
    lengths = sorted(fates, key=lambda fate: fate.prompt)
    parts = [lengths[n * sent // 4 : (n + 1) * sent // 4] for n in range(4)]
    return Figures(
        fmean(fate.good for fate in fates),
        sum(fate.good for fate in fates) / (fates[-1].at - fates[0].at),
        waits[math.ceil(0.99 * len(waits)) - 1] / slo.ttft,
        fmean(fate.refused for fate in fates),
        best_effort / sent,
        tuple(fmean(fate.good for fate in part) for part in parts),
    )


# Setting, mode, rate (requests/s), seconds of traffic, seed, CV of the gaps between arrivals.
Task = tuple[str, str, float, float, int, float]


def simulated(task: Task) -> Figures:
    """One run to its end."""
    name, mode, rate, seconds, seed, cv = task
    setting = SETTINGS[name]
    scene, contender = setting.scene(cv), setting.contender
    cluster = scene.cluster(contender.sliders, rate, round(rate * seconds), seed)
    policy = replace(contender.policy, overload=mode)
    scheduler = scene.scheduler(contender.sliders, policy, cluster.capacities)
    watch = Watch(scheduler, setting.slo)
    run(watch, cluster)
    return figures([*watch.fates.values()], scheduler.counters.best_effort, setting.slo)


def kept(task: Task) -> float:
    """The share of good requests of one run, or whatever bound decides whether it is at least 90 %."""
    name, mode, rate, seconds, seed, cv = task
    setting = SETTINGS[name]
    policy = replace(setting.contender.policy, overload=mode)
    contender = replace(setting.contender, policy=policy)
    return attain(setting.scene(cv), contender, rate, round(rate * seconds), seed).attainment


def goodput(pool: Any, name: str, mode: str, guess: float, args: argparse.Namespace) -> float:
    """The highest rate (requests/s) at which 90 % are good, on average over the seeds."""
    bracket = Bracket(guess, TOLERANCE, step=1.04)
    while (rate := bracket.next()) is not None:
        tasks = [(name, mode, rate, args.seconds, seed, args.cv) for seed in args.seeds]
        shares = pool.map(kept, tasks, chunksize=1)
        bracket = bracket.after(rate, fmean(shares) >= TARGET)
    return bracket.low


def said(values: Sequence[float], digits: int = 2) -> str:
    """A mean with half of its 95 % interval, where there is one."""
    found = interval(values)
    half = "" if math.isnan(found.half) else f" ± {found.half:.{digits}f}"
    return f"{found.mean:.{digits}f}{half}"


def row(mode: str, load: float, runs: Sequence[Figures], least: float) -> str:
    """A line of the table; `least` is the highest rate of good requests at a lower load."""
    good = fmean(one.good for one in runs)
    quartiles = " ".join(f"{fmean(part):.2f}" for part in zip(*(one.quartiles for one in runs), strict=True))
    cells = (
        mode,
        f"{load:g}",
        said([one.attainment for one in runs]),
        f"{said([one.good for one in runs])} ({good / max(good, least):.0%})",
        f"{fmean(one.wait for one in runs):.2f}",
        f"{fmean(one.refused for one in runs):.3f}",
        f"{fmean(one.best_effort for one in runs):.3f}",
        quartiles,
    )
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| mode | times own goodput | attainment | good requests/s (of the peak so far) | p99 TTFT over SLO "
    "| refused | best effort | by quartile of length |\n|---|---:|---:|---:|---:|---:|---:|---|"
)


def main() -> None:
    """Print the tables."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--setting", choices=list(SETTINGS), action="append", help=f"default: {THREE}")
    parser.add_argument("--mode", choices=OVERLOAD, action="append")
    parser.add_argument("--load", type=float, nargs="+", default=list(LOADS), metavar="X")
    parser.add_argument("--own", type=float, metavar="R", help="own goodput, where it is known")
    parser.add_argument("--cv", type=float, default=1.0, help="of the gaps between arrivals; 1: Poisson")
    parser.add_argument("--goodputs", action="store_true", help="search that of every mode")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    out = []
    modes = args.mode or list(OVERLOAD)
    with Pool(args.processes) as pool:
        for name in args.setting or THREE:
            setting = SETTINGS[name]
            own = args.own or goodput(pool, name, SERVE, setting.guess, args)
            print(f"\n{name}, {setting.contender.name}: own goodput {own:.3g} requests/s\n\n{HEAD}")
            for mode in modes:
                if args.goodputs and mode != SERVE:
                    print(f"goodput of {mode}: {goodput(pool, name, mode, own, args):.3g}", flush=True)
                peak = 0.0
                for load in args.load:
                    tasks = [(name, mode, load * own, args.seconds, seed, args.cv) for seed in args.seeds]
                    runs = pool.map(simulated, tasks, chunksize=1)
                    print(row(mode, load, runs, peak), flush=True)
                    peak = max(peak, fmean(one.good for one in runs))
                    about = {"setting": name, "mode": mode, "load": load, "own": own}
                    out += [about | asdict(one) for one in runs]
    if args.json:
        args.json.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
