"""taichi search: the best sliders for a workload and an SLO, for all three ways of serving, each tuned for
itself."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from taichi_serve.commands.files import made, unwritable
from taichi_serve.commands.scene import add_scene, scene_of
from taichi_serve.search.balance import balance
from taichi_serve.search.bound import bound
from taichi_serve.search.families import FAMILIES
from taichi_serve.search.goodput import Scene, attain
from taichi_serve.search.report import config, config_text, draw_curves, draw_pareto, found_row
from taichi_serve.search.sliders import Effort, Found, Tell, best, search
from taichi_serve.slo import SLO

BALANCED = "balanced"
CURVE = (0.6, 0.75, 0.85, 0.92, 0.97, 1.0, 1.03, 1.08, 1.15)  # of the best goodput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `taichi search`."""
    more = f", or {BALANCED}: where aggregation and disaggregation, each tuned, have the same goodput"
    add_scene(parser, _ttft, more)
    parser.add_argument("--instances", type=int, default=8, metavar="N")
    parser.add_argument(
        "--family", action="append", choices=list(FAMILIES), help="only this one (repeatable)"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="of traffic in a full run")
    parser.add_argument("--most", type=int, default=4000, help="requests in a full run, however many seconds")
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
        if args.instances < 2:
            raise ValueError(f"--instances: must be at least 2, not {args.instances}")
        if args.most < 1:
            raise ValueError(f"--most: must be at least 1, not {args.most}")
        _check_outputs(args)
        effort = Effort(seconds=args.seconds, most=args.most, knobs=True)
        with console.status("searching") as status:

            def tell(text: str) -> None:
                status.update(f"{time.perf_counter() - began:.0f} s  {text}")

            scene = _scene(args, console, tell)
            families = args.family or tuple(FAMILIES)
            found = search(scene, args.instances, args.seed, families, effort, args.processes, tell)
    except ValueError as error:
        print(f"taichi search: {error}", file=sys.stderr)  # noqa: T201
        return 2
    limit = bound(scene.machine, scene.workload, scene.slo.tpot, args.instances, scene.max_running)
    if scene.workload.note:
        console.print(scene.workload.note, soft_wrap=True, markup=False)
    if args.json:
        rows = [found_row(f) for f in found]
        told = {"bound": limit, "ranked": rows, "config": config(scene, found[0].contender)}
        print(json.dumps(told | _noted(scene), indent=1))  # noqa: T201
    else:
        _show(found, limit, scene, time.perf_counter() - began)
    if args.out:
        Path(args.out).write_text(config_text(scene, found[0].contender))
    if args.tuned:
        _write_tuned(found, scene, Path(args.tuned))
    if args.plot:
        _draw(found, scene, Path(args.plot), effort.requests(limit), args.seed)
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """Raises ValueError before anything is searched."""
    if args.out and (why := unwritable(Path(args.out))):
        raise ValueError(f"--out: {why}")
    for folder in (args.tuned, args.plot):
        if folder:
            made(Path(folder))


def _write_tuned(found: list[Found], scene: Scene, folder: Path) -> None:
    for family, entry in best(found).items():
        (folder / f"{family}.yaml").write_text(config_text(scene, entry.contender))


def _noted(scene: Scene) -> dict[str, str]:
    return {"note": scene.workload.note} if scene.workload.note else {}


def _show(found: list[Found], limit: float, scene: Scene, took: float) -> None:
    table = Table(
        title=f"{scene.workload.name} on {scene.machine.name}, SLO {scene.slo.ttft:g} s and "
        f"{scene.slo.tpot * 1e3:g} ms, bound {limit:.3g} requests/s"
    )
    for name in ("", "goodput", "of bound", "P90 TTFT", "P90 TPOT", "moves"):
        table.add_column(name, justify="left" if not name else "right")
    firsts = {id(f) for f in best(found).values()}
    for entry in found:
        row: dict[str, Any] = found_row(entry)
        table.add_row(
            entry.label,
            f"{entry.rate:.3g}",
            f"{entry.share:.0%}",
            f"{row['ttft_p90']:.2f} s" if entry.tally else "-",
            f"{row['tpot_p90'] * 1e3:.1f} ms" if entry.tally else "-",
            f"{row['moves_per_request']:.2f}",
            style="bold" if id(entry) in firsts else None,
        )
    console = Console()
    console.print(table)
    console.print(f"{took:.0f} s; differences below 3 % are within the error of step times", style="dim")


def _draw(found: list[Found], scene: Scene, folder: Path, requests: int, seed: int) -> None:
    draw_pareto(found, scene, folder / "pareto.svg")
    top = found[0].rate
    curves = {}
    for entry in best(found).values():
        rates = [top * share for share in CURVE]
        points = [attain(scene, entry.contender, rate, requests, seed).attainment for rate in rates]
        curves[entry.label] = list(zip(rates, points, strict=True))
    draw_curves(curves, folder / "attainment.svg", scene.workload.name)
