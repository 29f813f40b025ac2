"""taichi search: the best sliders for a workload and an SLO, for all three ways of serving, each tuned for
itself."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from taichi_serve.commands.files import made, say_written, unwritable
from taichi_serve.commands.progress import working
from taichi_serve.commands.scene import add_scene, scene_of
from taichi_serve.scheduling.policy import OVERLOAD, SERVE
from taichi_serve.search.balance import balance
from taichi_serve.search.bound import bound
from taichi_serve.search.effort import Effort, Plan, plan
from taichi_serve.search.families import FAMILIES
from taichi_serve.search.goodput import Scene, attain
from taichi_serve.search.report import (
    against,
    config,
    config_text,
    draw_curves,
    draw_pareto,
    found_row,
    promise,
)
from taichi_serve.search.sliders import Found, Tell, best, search
from taichi_serve.slo import SLO

BALANCED = "balanced"
WIDE = 132  # columns, where the table goes into a file
CURVE = (0.6, 0.75, 0.85, 0.92, 0.97, 1.0, 1.03, 1.08, 1.15)  # of the best goodput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `taichi search`."""
    more = f", or {BALANCED}: where aggregation and disaggregation, each tuned, have the same goodput"
    add_scene(parser, _ttft, more)
    parser.add_argument("--instances", type=int, default=8, metavar="N", help="in all")
    parser.add_argument(
        "--family", action="append", choices=list(FAMILIES), help="only this one (repeatable)"
    )
    parser.add_argument(
        "--overload",
        choices=OVERLOAD,
        default=SERVE,
        help="what all of them do with a request that can no longer meet its TTFT (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="of traffic in a full run, at least")
    parser.add_argument(
        "--most", type=int, default=16_000, help="requests in a full run, whatever asks for more"
    )
    parser.add_argument(
        "--error",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="standard error of the work of the requests that the best of each family is judged with "
        "(default: 0.01); how many these are follows from the workload's variance",
    )
    parser.add_argument(
        "--judging", type=int, default=60_000, metavar="N", help="such requests at most (default: 60000)"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="default: one for each core")
    parser.add_argument(
        "--out", metavar="FILE", help="write the best as a config for `taichi serve --config`"
    )
    parser.add_argument(
        "--tuned",
        metavar="DIR",
        help="write the best of each family to DIR/FAMILY.yaml, for `taichi bench goodput --tuned DIR`",
    )


def _ttft(word: str) -> float | None:
    """Seconds; None where it is to be found."""
    return None if word == BALANCED else float(word)


def _scene(args: argparse.Namespace, console: Console, tell: Tell) -> Scene:
    """What the options describe, with the TTFT SLO that was asked for or the balanced one."""
    if args.ttft_slo is not None:
        return scene_of(args)
    if args.classes:
        raise ValueError("--ttft-slo balanced needs requests that all have the same SLO, not --classes")
    scene = scene_of(argparse.Namespace(**{**vars(args), "ttft_slo": 1.0}))  # whatever: it is replaced
    found = balance(scene, args.instances, args.seed, processes=args.processes, tell=tell)
    console.print(
        f"balanced at a TTFT SLO of {found.ttft:g} s: aggregation {found.aggregation:.3g}, disaggregation "
        f"{found.disaggregation:.3g} requests/s",
        soft_wrap=True,
    )
    return replace(scene, slo=SLO(found.ttft, scene.slo.tpot))


def main(args: argparse.Namespace) -> int:
    """Search; 0, or 2 after one line about bad input."""
    console = Console(stderr=True)
    began = time.perf_counter()
    try:
        effort = _effort(args)
        _check_outputs(args)
        with working(console, "searching") as tell:
            scene = _scene(args, console, tell)
            families = args.family or tuple(FAMILIES)
            found = search(
                scene, args.instances, args.seed, families, effort, args.processes, tell, args.overload
            )
    except ValueError as error:
        print(f"taichi search: {error}", file=sys.stderr)  # noqa: T201
        return 2
    limit = bound(scene.machine, scene.workload, scene.loosest.tpot, args.instances, scene.max_running)
    runs = plan(scene, limit, effort, args.seed)
    if scene.workload.note:
        console.print(scene.workload.note, soft_wrap=True, markup=False)
    if args.json:
        print(json.dumps(_told(found, limit, runs, scene), indent=1))  # noqa: T201
    else:
        _show(found, limit, runs, scene)
        Console().print(f"{time.perf_counter() - began:.0f} s", style="dim")
    with working(console, "drawing"):
        written = list(_written(found, scene, runs, args))
    say_written(written, console)
    return 0


def _written(found: list[Found], scene: Scene, runs: Plan, args: argparse.Namespace) -> Iterator[Path]:
    """Every file that was asked for, once it is written."""
    if args.out:
        Path(args.out).write_text(config_text(scene, found[0].contender))
        yield Path(args.out)
    if args.tuned:
        yield from _write_tuned(found, scene, Path(args.tuned))
    if args.plot:
        yield from _draw(found, scene, Path(args.plot), runs)


def _effort(args: argparse.Namespace) -> Effort:
    """What the options ask for; ValueError is one line that says what is wrong."""
    if args.instances < 2:
        raise ValueError(f"--instances: must be at least 2, not {args.instances}")
    if args.most < 1:
        raise ValueError(f"--most: must be at least 1, not {args.most}")
    if not args.error > 0:
        raise ValueError(f"--error: must be above 0, not {args.error}")
    if args.judging < 0:
        raise ValueError(f"--judging: must be at least 0, not {args.judging}")
    return Effort(seconds=args.seconds, most=args.most, knobs=True, error=args.error, judging=args.judging)


def _check_outputs(args: argparse.Namespace) -> None:
    """Raises ValueError before anything is searched."""
    if args.out and (why := unwritable(Path(args.out))):
        raise ValueError(f"--out: {why}")
    for folder in (args.tuned, args.plot):
        if folder:
            made(Path(folder))


def _write_tuned(found: list[Found], scene: Scene, folder: Path) -> Iterator[Path]:
    for family, entry in best(found).items():
        path = folder / f"{family}.yaml"
        path.write_text(config_text(scene, entry.contender))
        yield path


def _told(found: list[Found], limit: float, runs: Plan, scene: Scene) -> dict[str, Any]:
    """The table as JSON."""
    seeds = {
        "requests": runs.requests,
        "tuning_seeds": list(runs.tuning),
        "judging_seeds": list(runs.judging),
        "dispersion": runs.dispersion,
        "error": runs.error if runs.judging else None,
        "cut": runs.cut,
    }
    rows = [found_row(f, found[0]) for f in found]
    note = {"note": scene.workload.note} if scene.workload.note else {}
    return {"bound": limit, **seeds, "ranked": rows, "config": config(scene, found[0].contender), **note}


def _show(found: list[Found], limit: float, runs: Plan, scene: Scene) -> None:
    table = Table(
        title=f"{scene.workload.name} on {scene.machine.name}, SLO {scene.slo.ttft:g} s and "
        f"{scene.slo.tpot * 1e3:g} ms, bound {limit:.3g} requests/s"
    )
    for name in ("", "goodput", "of bound", "against best", "P90 TTFT", "P90 TPOT", "moves"):
        table.add_column(name, justify="left" if not name else "right")
    firsts = {id(f) for f in best(found).values()}
    for entry in found:
        row = found_row(entry, found[0])
        table.add_row(
            entry.label,
            _rate(entry),
            f"{entry.share:.0%}",
            _behind(entry, found[0]),
            f"{row['ttft_p90']:.2f} s" if entry.tally else "-",
            f"{row['tpot_p90'] * 1e3:.1f} ms" if entry.tally else "-",
            f"{row['moves_per_request']:.2f}",
            style="bold" if id(entry) in firsts else None,
        )
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    console.print(table)
    console.print(promise(runs), style="bold" if runs.cut else "dim", soft_wrap=True)
    console.print("differences below 3 % are within the error of step times", style="dim")


def _rate(entry: Found) -> str:
    """With half of its interval; a rate that was only tuned is marked."""
    spread = entry.interval
    return f"{spread.mean:.3g} ± {spread.half:.2g}" if spread else f"{entry.rate:.3g} (tuning)"


def _behind(entry: Found, first: Found) -> str:
    ahead = against(entry, first)
    return f"{ahead.mean:+.1%} ± {ahead.half:.1%}" if ahead else "-"


def _draw(found: list[Found], scene: Scene, folder: Path, runs: Plan) -> Iterator[Path]:
    pareto, attainment = folder / "pareto.svg", folder / "attainment.svg"
    draw_pareto(found, scene, pareto)
    yield pareto
    top = found[0].rate
    seed = (runs.judging or runs.tuning)[0]
    curves = {}
    for entry in best(found).values():
        rates = [top * share for share in CURVE]
        points = [attain(scene, entry.contender, rate, runs.requests, seed).attainment for rate in rates]
        curves[entry.label] = list(zip(rates, points, strict=True))
    draw_curves(curves, attainment, scene.workload.name)
    yield attainment
