"""`taichi bench goodput`: the highest request rate at which a real server keeps its SLOs, by bisection."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import platform
from pathlib import Path

from rich.console import Console
from rich.table import Table

from taichi_serve.bench.endpoint import EndpointGoneError
from taichi_serve.bench.report import (
    HEADS,
    Result,
    as_json,
    conditions,
    draw,
    markdown,
    notes_of,
    read,
    row,
    write,
)
from taichi_serve.bench.trial import Trial
from taichi_serve.commands import contenders
from taichi_serve.commands.installed import own_version, without_engines
from taichi_serve.commands.interrupts import Interrupts, Stopped
from taichi_serve.commands.measure import Measured, ours, running
from taichi_serve.commands.scene import add_workload, arrivals_of
from taichi_serve.commands.subserver import ServerError
from taichi_serve.slo import SLO

ANY_LENGTH = 1 << 40  # a model's limit is known when it is served
USAGE = "taichi bench goodput URL-or-MODEL --workload W --ttft-slo S --tpot-slo S [...] [-- SERVE-FLAGS]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how."""
    parser.add_argument("target", metavar="URL-or-MODEL", help="a running server, or a model to serve")
    add_workload(parser)
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="of all lengths (default: 1)")
    parser.add_argument("--ttft-slo", type=float, required=True, metavar="S", help="seconds")
    parser.add_argument("--tpot-slo", type=float, required=True, metavar="S", help="seconds per output token")
    parser.add_argument("--attainment", type=float, default=0.9, metavar="SHARE", help="(default: 0.9)")
    parser.add_argument(
        "--requests", type=int, default=200, metavar="N", help="that count, for each seed (default: 200)"
    )
    parser.add_argument(
        "--warm-up", type=int, default=20, metavar="N", help="sent before those at every rate (default: 20)"
    )
    parser.add_argument("--seeds", default="0", metavar="N,N", help="of lengths and arrivals (default: 0)")
    parser.add_argument("--start", type=float, default=1.0, metavar="R", help="first rate, requests/s (1)")
    parser.add_argument("--tolerance", type=float, default=0.1, metavar="SHARE", help="of the rate (0.1)")
    parser.add_argument("--full", action="store_true", help="no rate ends before its last request")
    parser.add_argument("--out", metavar="DIR", help="write results, table and picture there")
    parser.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY"), help="(default: $OPENAI_API_KEY)"
    )
    contenders.add_arguments(parser)


def main(argv: list[str]) -> int:
    """`taichi bench` with these words; the exit status."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="taichi bench")
    commands = parser.add_subparsers(required=True, metavar="goodput")
    add_arguments(commands.add_parser("goodput", description=__doc__, usage=USAGE))
    args = parser.parse_args(argv[:cut])
    console = Console(stderr=True, highlight=False)
    try:
        trial = trial_of(args)
        jobs = jobs_of(args, tuple(argv[cut + 1 :]), trial)
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)  # before hours of measuring, not after them
        interrupts = Interrupts()
        results = [result(args, trial, *job, console, interrupts) for job in jobs.items()]
        report(results, args.out)
    except Stopped as stopped:
        console.print("bench: stopped; nothing is left running")
        return 128 + stopped.number
    except (ServerError, EndpointGoneError) as wrong:
        console.print(f"taichi bench: {wrong}", soft_wrap=True, markup=False)
        return 1
    except (ValueError, OSError) as wrong:
        console.print(f"taichi bench: {wrong}", soft_wrap=True, markup=False)
        return 2
    return 0


def trial_of(args: argparse.Namespace) -> Trial:
    """What the options describe; ValueError is one line that says what is wrong."""
    try:
        seeds = tuple(int(word) for word in args.seeds.split(","))
    except ValueError:
        raise ValueError(f"--seeds: expected whole numbers with commas between, not {args.seeds!r}") from None
    slo = SLO(args.ttft_slo, args.tpot_slo)
    sizes = args.attainment, args.requests, args.warm_up, seeds
    rates = args.start, args.tolerance, args.full
    trial = Trial(args.workload, slo, args.scale, *sizes, *rates, args.over_limit, arrivals_of(args))
    trial.lengths(ANY_LENGTH)  # a trace that cannot be read is told before a server is started
    return trial


def jobs_of(args: argparse.Namespace, flags: tuple[str, ...], trial: Trial) -> dict[str, tuple[str, ...]]:
    """Names, and the words of `taichi serve` for each; none for a server that runs."""
    if args.target.startswith(("http://", "https://")):
        if args.compare or flags:
            raise ValueError("--compare and flags of taichi serve need a MODEL, not a URL")
        return {"server": ()}
    if why := without_engines():
        raise ValueError(why)
    path = Path(args.target)
    if path.exists() or args.target.startswith((".", "/", "~")):
        args.target = str(path.expanduser())
        if not (Path(args.target) / "config.json").is_file():
            raise ValueError(f"{args.target}: no model: it has no config.json")
    slos = ("--ttft-slo", str(trial.slo.ttft), "--tpot-slo", str(trial.slo.tpot))
    if not args.compare:
        if args.tuned:
            raise ValueError("--tuned needs --compare, which says what is to be measured")
        return {"server": (*slos, *flags)}
    compared = contenders.contenders(args, trial.slo)
    return {name: (*slos, *words.instance, *flags, *words.settings) for name, words in compared.items()}


def result(
    args: argparse.Namespace,
    trial: Trial,
    name: str,
    flags: tuple[str, ...],
    console: Console,
    interrupts: Interrupts,
) -> Result:
    """Measure one, or take what an earlier run of the same command left in the folder."""
    path = Path(args.out) / f"{name}.json" if args.out else None
    kept = without_key(flags)
    if path and flags and (old := read(path)) and old.same(args.target, trial, kept):
        console.print(f"{name}  measured {old.date}, taken from {path}", soft_wrap=True)
        return old
    measured: Measured
    if flags:
        measured = ours(name, (args.target, *flags), args.api_key, trial, console, interrupts)
    else:
        measured = asyncio.run(
            interrupts.watch(running(name, args.target.rstrip("/"), args.api_key, trial, console))
        )
    made = Result(
        name,
        args.target,
        trial,
        kept,
        measured.goodput,
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        f"taichi-serve {own_version()}, vLLM {measured.version}, Python {platform.python_version()}",
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        measured.notes,
    )
    if path:
        write(made, path)
    return made


def without_key(flags: tuple[str, ...]) -> tuple[str, ...]:
    """The flags as they may be written down."""
    masked = (
        "***" if before == "--api-key" else word for before, word in zip(("", *flags), flags, strict=False)
    )
    return tuple("--api-key=***" if word.startswith("--api-key=") else word for word in masked)


def report(results: list[Result], out: str | None) -> None:
    """Print the table, and write it."""
    rows = [row(one) for one in results]
    table = Table(title=conditions(results[-1]), title_justify="left")
    for head, *cells in zip(HEADS, *rows, strict=True):
        if head == HEADS[0]:
            for name in (head, *cells):
                table.add_column(name, justify="left" if name == head else "right")
        else:
            table.add_row(head, *cells)
    console = Console(highlight=False)
    console.print(table)
    for note in notes_of(results):
        console.print(note, soft_wrap=True, markup=False)
    if out:
        folder = Path(out)
        (folder / "goodput.md").write_text(markdown(results), encoding="utf-8")
        (folder / "goodput.json").write_bytes(as_json(results))
        draw(results, folder / "goodput.svg")
