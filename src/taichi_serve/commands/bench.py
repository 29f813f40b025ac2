"""`taichi bench goodput`: the highest request rate at which a real server keeps its SLOs, by bisection."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from taichi_serve.bench import pairtable, usage
from taichi_serve.bench.contest import Contest
from taichi_serve.bench.endpoint import EndpointGoneError
from taichi_serve.bench.pairs import pairs
from taichi_serve.bench.report import (
    HEADS,
    Result,
    as_json,
    by_class,
    conditions,
    draw,
    markdown,
    notes_of,
    read,
    row,
    write,
)
from taichi_serve.bench.senders import SenderError, chosen
from taichi_serve.bench.trial import Trial
from taichi_serve.commands import contenders
from taichi_serve.commands.compare import compared, file_name
from taichi_serve.commands.contenders import without_key
from taichi_serve.commands.files import say_written
from taichi_serve.commands.helping import EachDefaultOnce
from taichi_serve.commands.installed import machine, today, versions_with, without_engines
from taichi_serve.commands.interrupts import Interrupts, Stopped
from taichi_serve.commands.measure import Measured, ours, running
from taichi_serve.commands.scene import add_workload, arrivals_of, mix_of
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
    parser.add_argument("--start", type=float, default=1.0, metavar="R", help="first rate, requests/s")
    parser.add_argument("--tolerance", type=float, default=0.1, metavar="SHARE", help="of the rate")
    help_step = "from the first rate up or down to the next; squared with every further one (default: 2)"
    parser.add_argument("--step", type=float, default=2.0, metavar="FACTOR", help=help_step)
    parser.add_argument(
        "--senders",
        type=int,
        default=0,
        metavar="N",
        help="processes that send the load; 0: by the cores of this machine (default: 0)",
    )
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
    formatter = EachDefaultOnce
    goodput = commands.add_parser("goodput", description=__doc__, usage=USAGE, formatter_class=formatter)
    add_arguments(goodput)
    args = parser.parse_args(argv[:cut])
    console = Console(stderr=True, highlight=False)
    try:
        trial, args.senders = trial_of(args), chosen(args.senders)
        jobs = jobs_of(args, tuple(argv[cut + 1 :]), trial)
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)  # before hours of measuring, not after them
        interrupts = Interrupts()
        if args.compare or args.contender:
            kept = compared(args, trial, jobs, console, interrupts)
            report(kept.results, args.out, kept.contest)
        else:
            report([result(args, trial, jobs["server"], console, interrupts)], args.out)
    except Stopped as stopped:
        console.print("bench: stopped; nothing is left running")
        return 128 + stopped.number
    except (ServerError, EndpointGoneError, SenderError) as wrong:
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
    which = args.over_limit, arrivals_of(args), mix_of(args, slo)
    trial = Trial(args.workload, slo, args.scale, *sizes, *rates, *which, args.step)
    trial.lengths(ANY_LENGTH)  # a trace that cannot be read is told before a server is started
    return trial


def jobs_of(
    args: argparse.Namespace, flags: tuple[str, ...], trial: Trial
) -> dict[str, contenders.Contender]:
    """Who is to be measured, by name."""
    asked = bool(args.compare or args.contender)
    if args.tuned and not args.compare:
        raise ValueError("--tuned needs --compare, which says what is to be measured")
    if args.target.startswith(("http://", "https://")):
        beside = args.compare.split(",") if args.compare else []
        if flags or args.contender or not all(url.startswith(("http://", "https://")) for url in beside):
            raise ValueError("flags of taichi serve, and contenders that are no URL, need a MODEL, not a URL")
        if not asked:
            return {"server": contenders.Contender("server", "url", url=args.target.rstrip("/"))}
        args.compare = ",".join([args.target, *beside])
        return contenders.field(args, (), trial.slo)
    if why := without_engines():
        raise ValueError(why)
    path = Path(args.target)
    if path.exists() or args.target.startswith((".", "/", "~")):
        args.target = str(path.expanduser())
        if not (Path(args.target) / "config.json").is_file():
            raise ValueError(f"{args.target}: no model: it has no config.json")
    if asked:
        return contenders.field(args, flags, trial.slo)
    words = (*contenders.judged_by(trial.slo), *flags)
    return {"server": contenders.Contender("server", "ours", words)}


def result(
    args: argparse.Namespace,
    trial: Trial,
    contender: contenders.Contender,
    console: Console,
    interrupts: Interrupts,
) -> Result:
    """Measure one, or take what an earlier run of the same command left in the folder."""
    name, flags = contender.name, contender.flags
    path = Path(args.out) / f"{name}.json" if args.out else None
    kept = without_key(flags)
    if path and flags and (old := read(path)) and old.same(args.target, trial, kept):
        console.print(f"{name}  measured {old.date}, taken from {path}", soft_wrap=True)
        return old
    measured: Measured
    if flags:
        words = (args.target, *flags)
        measured = ours(name, words, args.api_key, trial, console, interrupts, args.senders)
    else:
        work = running(name, contender.url, args.api_key, trial, console, args.senders)
        measured = asyncio.run(interrupts.watch(work))
    made = Result(
        name,
        args.target,
        trial,
        kept,
        measured.goodput,
        today(),
        versions_with(measured.version),
        machine(),
        measured.notes,
    )
    if path:
        write(made, path)
    return made


def report(results: list[Result], out: str | None, contest: Contest | None = None) -> None:
    """Print the tables, and write them."""
    table = Table(title=conditions(results[-1]), title_justify="left")
    _turned(table, HEADS, [row(one) for one in results])
    console = Console(highlight=False)
    console.print(table)
    for note in (*notes_of(results), *(line for one in results for line in by_class(one))):
        console.print(note, soft_wrap=True, markup=False)
    folder = Path(out) if out else None
    found = pairs(contest) if contest else []
    if contest and found:
        for words in (*pairtable.lines(found), *usage.lines(contest), pairtable.machine(contest)):
            console.print(words, soft_wrap=True, markup=False)
    if folder:
        more = f"\n{pairtable.markdown(contest, found)}\n{usage.markdown(contest)}" if contest else ""
        (folder / "goodput.md").write_text(markdown(results) + more, encoding="utf-8")
        (folder / "goodput.json").write_bytes(as_json(results))
        draw(results, folder / "goodput.svg")
        if contest:
            (folder / "pairs.json").write_bytes(pairtable.as_json(contest, found))
        say_written(_files(results, folder), Console(stderr=True))


def _files(results: Sequence[Result], folder: Path) -> list[Path]:
    """What a measurement leaves in its folder."""
    each = [f"{file_name(one.name)}.json" for one in results]
    all_of = ["compare.json", "pairs.json", "goodput.md", "goodput.json", "goodput.svg"]
    return [path for name in (*each, *all_of) if (path := folder / name).exists()]


def _turned(table: Table, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A column for each row."""
    first, *others = zip(heads, *rows, strict=True)
    for name in first:
        table.add_column(name, justify="left" if name == heads[0] else "right")
    for cells in others:
        table.add_row(*cells)
