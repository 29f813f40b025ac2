"""Write docs/paper.md: the figures of the paper again, from simulation, side by side with the paper's.

usage: python scripts/paper.py TRACE [--seconds 120] [--seeds 5] [--processes N] [--only STAGE] [--write]

TRACE is a CSV of the arXiv summarization lengths (Table 2). Every stage keeps its figures in
build/paper/STAGE.json, and every setting of a longer stage in a .part.json of its own, and is not run again
while that file is there: what was stopped goes on where it was. The page is written from the files. `--seeds`
is for attainments at given rates; how many seeds judge a goodput follows from the workload.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from paper_page import write

from taichi_serve.bench.goodput import Meter
from taichi_serve.bench.workload import workload
from taichi_serve.cluster.base import run
from taichi_serve.latency.shipped import machine
from taichi_serve.messages import Command, Event, Finished, Prefilled, Stepped
from taichi_serve.scheduling.policy import Policy
from taichi_serve.search.bound import bound
from taichi_serve.search.climb import climb
from taichi_serve.search.crew import workers
from taichi_serve.search.curve import spread as spread_of
from taichi_serve.search.effort import Effort, plan
from taichi_serve.search.families import FAMILIES, end_of
from taichi_serve.search.goodput import Contender, Scene
from taichi_serve.search.interval import interval
from taichi_serve.search.report import curve_row
from taichi_serve.search.sliders import FAR, best, search
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "build/paper"
Json = dict[str, Any]

TABLE_2 = ((16.0, 0.06, 7, 98), (5.0, 0.25, 97, 42), (6.0, 0.1, 16, 50))
LIKELY = (
    Contender("aggregation, chunk 1024", Sliders(0, 8, 0, 1024), Policy(ttft_margin=1.0)),
    Contender("disaggregation, 5P3D", Sliders(5, 3, 4096, 0), Policy(ttft_margin=1.0, watermark=1.0)),
    Contender("hybrid, 5P3D, 2048 and 256", Sliders(5, 3, 2048, 256), Policy()),
)
SETTINGS = tuple(
    (profile, instances, load, slo)
    for profile, instances in (("qwen2.5-14b-tp1-a100", 8), ("qwen2.5-32b-tp2-a100", 4))
    for load, slos in (
        ("summarization", (SLO(4, 0.07), SLO(6, 0.05))),
        ("sharegpt", (SLO(3, 0.11), SLO(4, 0.07))),
    )
    for slo in slos
)


# An empty cluster fills for as long as a chat's answers take, half a minute: with runs of a minute all were
# above the bound.
LONGER = {("qwen2.5-14b-tp1-a100", "sharegpt"): 2.0}


def scene(profile: str, load: str, slo: SLO) -> Scene:
    """A setting with its workload."""
    found = machine(profile)
    return Scene(found, workload(load, min(found.max_model_len, found.kv_capacity)), slo)


def spread(values: Sequence[float]) -> list[float]:
    """Mean and half of the 95 % interval over seeds."""
    found = interval(values)
    return [found.mean, found.half]


def origin() -> str:
    """Of which day and commit a figure is."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {told.stdout.strip() or 'no commit'}"


def shares(crew: Any, contender: Contender, rate: float, requests: int, seeds: int) -> list[float]:
    """Attainment for every seed."""
    tasks = [(contender, rate, requests, s) for s in range(1, seeds + 1)]
    return [t.attainment for t in crew.attain_all(tasks)]


def tuned(sc: Scene, instances: int, effort: Effort, processes: int | None) -> Json:
    """Every family tuned, and judged on seeds that the tuning has not seen; on the same seeds Orca's whole
    prompts, and the hybrid's sliders with Algorithm 2 as it stands."""
    top = bound(sc.machine, sc.workload, sc.slo.tpot, instances)
    made = plan(sc, top, effort, 0)
    firsts = best(search(sc, instances, 0, tuple(FAMILIES), effort, processes))
    longest = min(8192, sc.machine.max_model_len)
    orca = Contender(f"whole prompts ({longest})", Sliders(0, instances, 0, longest), Policy(ttft_margin=1.0))
    hybrid = firsts["hybrid"].contender
    literal = replace(hybrid, policy=replace(hybrid.policy, ttft_margin=1.0, tpot_margin=10.0))
    literal = replace(literal, name=f"literal (no margins): {hybrid.name}")
    others = ((orca, firsts["aggregation"].rate), (literal, firsts["hybrid"].rate))
    with workers(sc, processes) as crew:
        reached = climb(crew, others, made.requests, made.judging, effort.tolerance, FAR * top)
    judged = {name: (f.contender, f.judged) for name, f in firsts.items()}
    names = ("whole prompts", "literal")
    judged |= {name: (c, r.curve) for name, (c, _), r in zip(names, others, reached, strict=True)}
    rows: dict[str, Json] = {}
    for name, (contender, curve) in judged.items():
        assert curve is not None
        found = spread_of(curve)
        goodput = [found.mean, found.half]
        rows[name] = {"contender": contender.name, "goodput": goodput, "curve": curve_row(curve)}
    tally = firsts["hybrid"].tally
    rows["hybrid"] |= {"end": end_of(hybrid), "moves": tally.moves if tally else {}}
    rows |= {name: rows[name] | {"tuned": f.tuned} for name, f in firsts.items()}
    seeds = {"requests": made.requests, "tuning": len(made.tuning), "judging": len(made.judging)}
    return {"bound": top, "error": made.error, "cut": made.cut, "made": origin(), **seeds, "rows": rows}


# ------------------------------------------------------------------------------------------------ stages


def table2(args: argparse.Namespace) -> Json:
    """The likely configurations at 12 requests/s, and whole curves."""
    out: Json = {"rows": [], "curves": {}}
    rates = (8.0, 9.0, 10.0, 10.5, 11.0, 11.5, 12.0, 12.5, 13.0)
    for ttft, tpot, *paper in TABLE_2:
        sc = scene("llama-2-70b-tp4-a100", args.trace, SLO(ttft, tpot))
        with workers(sc, args.processes) as crew:
            row = {c.name: spread(shares(crew, c, 12.0, 1500, args.seeds)) for c in LIKELY}
            out["rows"].append({"slo": [ttft, tpot], "paper": paper, "ours": row})
            if (ttft, tpot) == (6.0, 0.1):
                for c in LIKELY:
                    points = [[r, *spread(shares(crew, c, r, 1000, args.seeds))] for r in rates]
                    out["curves"][c.name] = points
    return out


def table2_tuned(args: argparse.Namespace) -> Json:
    """The same cluster with every family tuned for each SLO."""
    effort = Effort(seconds=args.seconds)
    rows = []
    for ttft, tpot, *_ in reversed(TABLE_2):
        part = KEPT / f"table2-{ttft:g}.part.json"
        if not part.exists():
            sc = scene("llama-2-70b-tp4-a100", args.trace, SLO(ttft, tpot))
            result = tuned(sc, 8, effort, args.processes)
            part.write_text(json.dumps({"slo": [ttft, tpot], **result}))
        rows.append(json.loads(part.read_text()))
    return {"rows": rows}


def goodput_14b(args: argparse.Namespace) -> Json:
    """The four goodput settings of the 14B model."""
    return _settings(args, "qwen2.5-14b-tp1-a100")


def goodput_32b(args: argparse.Namespace) -> Json:
    """The four goodput settings of the 32B model."""
    return _settings(args, "qwen2.5-32b-tp2-a100")


def _settings(args: argparse.Namespace, wanted: str) -> Json:
    rows = []
    for profile, instances, load, slo in SETTINGS:
        if profile != wanted:
            continue
        part = KEPT / f"{profile}-{load}-{slo.ttft:g}.part.json"
        if not part.exists():
            began = time.perf_counter()
            effort = Effort(seconds=args.seconds * LONGER.get((profile, load), 1.0))
            result = tuned(scene(profile, load, slo), instances, effort, args.processes)
            part.write_text(json.dumps({"workload": load, "slo": [slo.ttft, slo.tpot], **result}))
            print(f"  {profile} {load} {slo} {time.perf_counter() - began:.0f} s", flush=True)
        rows.append(json.loads(part.read_text()))
    return {"rows": rows}


def ablation(args: argparse.Namespace) -> Json:
    """Chunk 256, then flowing decode, then length-aware prefill, at one rate."""
    sc = scene("qwen2.5-14b-tp1-a100", "summarization", SLO(4, 0.07))
    sliders = Sliders(4, 4, 2048, 256)
    steps = (
        Contender("chunk 256 aggregation", Sliders(0, 8, 0, 256), Policy(ttft_margin=1.0)),
        # With no margin nothing is ever feasible, and a prompt goes where its first token is predicted
        # soonest.
        Contender("+ flowing decode", sliders, Policy(ttft_margin=1e-9)),
        Contender("+ length-aware prefill", sliders, Policy()),
    )
    out: Json = {"rates": [5.0, 5.4, 5.7], "rows": []}
    with workers(sc, args.processes) as crew:
        for c, paper in zip(steps, (66.6, 79.5, 91.2), strict=True):
            ours = [spread(shares(crew, c, rate, 700, args.seeds)) for rate in out["rates"]]
            out["rows"].append({"name": c.name, "paper": paper, "ours": ours})
    return out


class Interference:
    """Per request: prompt tokens computed beside its decode over its output length, and its TPOT."""

    def __init__(self, inner: Meter) -> None:
        self.inner = inner
        self.computed: dict[str, int] = {}
        self.began: dict[str, tuple[float, str, int]] = {}
        self.points: list[tuple[float, float]] = []

    def on(self, event: Event) -> Sequence[Command]:
        """Watch, and pass on."""
        if isinstance(event, Stepped):
            self.computed[event.instance] = self.computed.get(event.instance, 0) + event.prefill_tokens
        elif isinstance(event, Prefilled):
            self.began[event.request] = event.at, event.instance, self.computed[event.instance]
        elif isinstance(event, Finished) and event.output_tokens > 16:
            at, instance, before = self.began.pop(event.request)
            intensity = (self.computed[instance] - before) / (event.output_tokens - 1)
            self.points.append((intensity, (event.at - at) / (event.output_tokens - 1)))
        return self.inner.on(event)


def interference(_: argparse.Namespace) -> Json:
    """TPOT against interference intensity, over chunks and rates, without moves."""
    sc = scene("qwen2.5-14b-tp1-a100", "sharegpt", SLO(3, 0.11))
    points: list[tuple[float, float]] = []
    for chunk, rate in ((256, 30.0), (512, 30.0), (512, 50.0), (1024, 45.0), (2048, 45.0)):
        sliders = Sliders(0, 8, 0, chunk)
        cluster = sc.cluster(sliders, rate, 1200, 1)
        policy = Policy(ttft_margin=1.0)
        scheduler = sc.scheduler(sliders, policy, cluster.capacities)
        watch = Interference(Meter(scheduler, sc.slo))
        run(watch, cluster)
        points += watch.points
    x, y = [p[0] for p in points], [p[1] for p in points]
    line = statistics.linear_regression(x, y)
    r2 = statistics.correlation(x, y) ** 2
    few = [[round(a, 3), round(b, 5)] for a, b in points[:: max(1, len(points) // 400)]]
    return {"n": len(points), "slope": line.slope, "intercept": line.intercept, "r2": r2, "points": few}


STAGES: dict[str, Callable[[argparse.Namespace], Json]] = {
    "interference": interference,
    "table2": table2,
    "ablation": ablation,
    "goodput_14b": goodput_14b,
    "table2_tuned": table2_tuned,
    "goodput_32b": goodput_32b,
}


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--only", choices=list(STAGES), action="append")
    parser.add_argument("--write", action="store_true", help="only write the page")
    args = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        path = KEPT / f"{name}.json"
        if args.write or path.exists() or (args.only and name not in args.only):
            continue
        began = time.perf_counter()
        path.write_text(json.dumps(stage(args)))
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        write(KEPT)
    write(KEPT)


if __name__ == "__main__":
    main()
