"""taichi simulate: one configuration on a virtual cluster; figures, JSON, pictures."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import to_builtins
from rich.console import Console
from rich.table import Table

from taichi_serve.bench.goodput import Tally
from taichi_serve.bench.sharing import shared
from taichi_serve.commands.files import made, say_written
from taichi_serve.commands.progress import Following, working
from taichi_serve.commands.scene import add_scene, scene_of
from taichi_serve.messages import Tuned
from taichi_serve.scheduling.policy import OVERLOAD, Policy
from taichi_serve.search.goodput import Contender, Scene, attain, attain_tuned
from taichi_serve.search.report import config, draw_times, summary
from taichi_serve.sliders import MODES, OFF, ON, Sliders

MARGINS = {
    "ttft-margin": "an instance is feasible up to this share of the TTFT SLO, as predicted",
    "tpot-margin": "prompts avoid a D-heavy instance above this share of the TPOT SLO, as predicted",
    "watermark": "share of KV memory above which requests are degraded",
    "alpha": "share of the TPOT SLO at which a degraded request flows back",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `taichi simulate`."""
    add_scene(parser)
    parser.add_argument("--p-heavy", type=int, required=True, metavar="N", help="P-heavy instances")
    parser.add_argument("--d-heavy", type=int, required=True, metavar="N", help="D-heavy instances")
    parser.add_argument("--p-chunk", type=int, required=True, metavar="TOKENS", help="prompt tokens a step")
    parser.add_argument("--d-chunk", type=int, required=True, metavar="TOKENS", help="0: no prefill there")
    for name, text in MARGINS.items():
        usual = getattr(Policy(), name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=float, default=usual, metavar="SHARE", help=text)
    parser.add_argument(
        "--autotune",
        choices=MODES,
        default=OFF,
        help="the sliders set themselves as those of a server do, from what is given here on; or what they "
        "would be set to is said (default: off)",
    )
    parser.add_argument(
        "--overload",
        choices=OVERLOAD,
        default=Policy().overload,
        help="what becomes of a request that can no longer meet its TTFT: it is served in its turn, it or "
        "the longest before it is best effort, or it is turned away (default: %(default)s)",
    )
    parser.add_argument(
        "--fair-classes",
        action="store_true",
        help="weights of --classes are shares of what is computed in time under overload; else the class "
        "with the lowest weight goes first",
    )
    parser.add_argument("--rate", type=float, required=True, metavar="R", help="requests/s")
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="that are sent")


def main(args: argparse.Namespace) -> int:
    """Run it; 0, or 2 after one line about bad input."""
    try:
        if args.requests < 1:
            raise ValueError(f"--requests: must be at least 1, not {args.requests}")
        if args.plot:
            made(Path(args.plot))
        with working(Console(stderr=True), "reading the workload"):
            scene = scene_of(args)
        sliders = Sliders(args.p_heavy, args.d_heavy, args.p_chunk, args.d_chunk)
        knobs = args.watermark, args.alpha, args.ttft_margin, args.tpot_margin
        policy = Policy(*knobs, overload=args.overload, fair=args.fair_classes)
        began = time.perf_counter()
        tally, changes = _run(scene, Contender("simulate", sliders, policy), args)
        took = time.perf_counter() - began
    except ValueError as error:
        print(f"taichi simulate: {error}", file=sys.stderr)  # noqa: T201
        return 2
    figures = {
        "config": config(scene, Contender("simulate", sliders, policy)),
        "workload": scene.workload.name,
        "arrivals": scene.workload.arrivals.words,
        **({"mix": scene.workload.mix.words} if scene.workload.mix.parts else {}),
        **_shared(scene, args),
        **({"note": scene.workload.note} if scene.workload.note else {}),
        "profile": scene.machine.name,
        "rate": args.rate,
        "seed": args.seed,
        **({} if args.autotune == OFF else {"tuned": [to_builtins(change) for change in changes]}),
        **summary(tally),
    }
    if scene.workload.note:
        print(f"taichi simulate: {scene.workload.note}", file=sys.stderr)  # noqa: T201
    if args.json:
        print(json.dumps(figures, indent=1))  # noqa: T201
    else:
        _show(figures, tally, scene, took)
        _show_changes(changes)
    if args.plot:
        draw_times(tally, scene, picture := Path(args.plot) / "times.svg")
        say_written([picture], Console(stderr=True))
    return 0


def _run(scene: Scene, contender: Contender, args: argparse.Namespace) -> tuple[Tally, list[Tuned]]:
    """The run, and how its sliders were set or would have been."""
    asked = args.rate, args.requests, args.seed
    counted = [Tally()]  # of the run, once it has begun
    console = Console(stderr=True)
    with Following(console, "requests simulated", args.requests, lambda: counted[-1].done):
        if args.autotune == OFF:
            return attain(scene, contender, *asked, watch=counted.append), []
        return attain_tuned(scene, contender, *asked, args.autotune == ON, watch=counted.append)


def _show_changes(changes: Sequence[Tuned]) -> None:
    console = Console(highlight=False)
    for change in changes:
        what = "" if change.act else "suggested: "
        console.print(f"{change.at:7.1f} s  {what}{change.why}", soft_wrap=True, markup=False)


def _show_classes(tally: Tally, scene: Scene, console: Console) -> None:
    """A line for each class of requests."""
    for part in scene.workload.mix.parts:
        of = tally.classes.get(part.name, Tally())
        low, high = of.interval()
        console.print(
            f"{part.name} ({part.slo.ttft:g} s and {part.slo.tpot * 1e3:g} ms): attainment "
            f"{of.attainment:.1%} ({low:.1%} to {high:.1%}), {of.good} of {of.sent} good; p90 "
            f"{of.ttft.quantile(0.9):.3g} s and {of.tpot.quantile(0.9) * 1e3:.3g} ms; "
            f"{of.in_time_tokens / max(1, tally.in_time_tokens):.1%} of the prompt tokens in time",
            highlight=False,
            soft_wrap=True,
        )


def _shared(scene: Scene, args: argparse.Namespace) -> dict[str, float]:
    """The share of prompt tokens that an infinite cache would have had, where prompts have blocks."""
    calls = list(scene.workload.calls(args.rate, args.requests, args.seed))
    if not any(call.blocks for call in calls):
        return {}
    return {"shared": shared(calls, scene.workload.block_size)}


def _show(figures: dict[str, Any], tally: Tally, scene: Scene, took: float) -> None:
    console = Console()
    sliders = figures["config"]
    table = Table(
        title=f"{sliders['p_heavy']} P-heavy ({sliders['p_chunk']}) + {sliders['d_heavy']} D-heavy "
        f"({sliders['d_chunk']}), {scene.workload.name}, {figures['rate']:g} requests/s"
    )
    for name in ("", "mean", "p50", "p90", "p99", "SLO"):
        table.add_column(name, justify="right")
    for name, unit, limit in (("ttft", 1.0, scene.slo.ttft), ("tpot", 1e3, scene.slo.tpot)):
        row = figures[name]
        label = "TTFT (s)" if name == "ttft" else "TPOT (ms)"
        table.add_row(
            label, *(f"{row[k] * unit:.3g}" for k in ("mean", "p50", "p90", "p99")), f"{limit * unit:g}"
        )
    console.print(table)
    low, high = tally.interval()
    console.print(
        f"attainment {tally.attainment:.1%} ({low:.1%} to {high:.1%}), {tally.good} of {tally.sent} good; "
        f"{f'{tally.refused} turned away; ' if tally.refused else ''}"
        f"moves: {', '.join(f'{move} {count}' for move, count in figures['moves'].items()) or 'none'}"
    )
    _show_classes(tally, scene, console)
    if "shared" in figures:
        console.print(
            f"of the prompt tokens an infinite cache would have had {figures['shared']:.1%}; "
            f"{figures['cached']:.1%} were cached, {figures['fetched']:.1%} fetched"
        )
    busy = ", ".join(f"{name} {share:.0%}" for name, share in figures["busy"].items())
    console.print(f"busy: {busy}", highlight=False)
    console.print(f"{tally.sent / took:,.0f} requests simulated a second", style="dim", highlight=False)
