"""`taichi demo`: a tiny model on two real vLLM instances, 40 real requests, and where each of them went."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from taichi_serve.commands import tables
from taichi_serve.commands.files import say_written, unwritable
from taichi_serve.commands.helping import EachDefaultOnce
from taichi_serve.commands.installed import without_engines
from taichi_serve.commands.interrupts import Interrupts, Stopped
from taichi_serve.commands.load import Load
from taichi_serve.commands.rows import Row, totals
from taichi_serve.commands.subserver import ServerError, Subserver
from taichi_serve.commands.workload import plan
from taichi_serve.slo import SLO
from taichi_serve.tiny import cached_tiny_model

MODEL = "tiny"
# Loose for a machine with a GPU, and met by two CPU cores that have other work too.
DEMO_SLO = SLO(ttft=2.0, tpot=0.15)
# The tiny model prefills fast: with the usual margin even its longest prompt could prefill anywhere.
TTFT_MARGIN = 0.1
P_CHUNK, D_CHUNK = 1024, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the demo can be told."""
    parser.add_argument("--requests", type=_count, default=40, help="how many to send (default: 40)")
    parser.add_argument("--rate", type=_rate, default=2.0, help="requests a second (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of lengths and arrivals (default: 0)")
    parser.add_argument("--json", metavar="FILE", help='write rows and totals there ("-": standard output)')
    parser.add_argument(
        "--page",
        action="store_true",
        help="open the live page in a browser, and go on with requests until Ctrl-C",
    )


def _count(word: str) -> int:
    if not (word.isdigit() and 1 <= int(word) <= 1000):
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from 1 to 1000")
    return int(word)


def _rate(word: str) -> float:
    if not 0 < (rate := float(word)) <= 1000:
        raise argparse.ArgumentTypeError(f"{word!r} is not a rate from 0 to 1000 requests a second")
    return rate


def main(argv: list[str]) -> int:
    """`taichi demo` with these words; the exit status."""
    parser = argparse.ArgumentParser(
        prog="taichi demo",
        description="Serve a tiny model on one P-heavy and one D-heavy vLLM instance, a CPU core each, send "
        "real requests over HTTP, and show where each of them was prefilled and decoded.",
        formatter_class=EachDefaultOnce,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    interrupts = Interrupts()
    console = Console(stderr=args.json == "-", highlight=False)
    if why := without_engines() or (args.json and args.json != "-" and unwritable(Path(args.json))):
        print(f"taichi demo: {why}", file=sys.stderr)  # noqa: T201
        return 2
    try:
        return run(args, console, interrupts)
    except Stopped as stopped:
        console.print("demo: stopped; nothing is left running")
        return 128 + stopped.number
    except ServerError as wrong:
        console.print(f"[red]demo:[/] {wrong}", soft_wrap=True)
        return 1


def run(args: argparse.Namespace, console: Console, interrupts: Interrupts) -> int:
    """Model, server, requests, tables."""
    began = time.monotonic()
    with console.status("making the tiny model"):
        model = cached_tiny_model()
    console.print(f"model    {model}", soft_wrap=True)
    server: Subserver | None = None
    keep = False
    try:
        with interrupts.hold():
            server = Subserver(server_words(model))
        work = _serve_and_load(args, console, server, began)
        rows, state = asyncio.run(interrupts.watch(work))
    except ServerError as wrong:
        keep = True
        log = server.log if server else "not there"
        raise ServerError(f"{wrong}\nits log is {log}") from None
    finally:
        with interrupts.hold(), console.status("stopping the server"):
            if server is not None:
                server.stop(keep)
    report(rows, state, args.json, console)
    console.print(f"done in {time.monotonic() - began:.0f} s")
    return 0 if all(row.error is None for row in rows) else 1


def server_words(model: Path) -> list[str]:
    """The words after `taichi serve`: one P-heavy and one D-heavy instance with a core each."""
    cores = sorted(os.sched_getaffinity(0))
    words = f"--served-model-name {MODEL} --max-model-len 4096 --enforce-eager --p-heavy 1 --d-heavy 1"
    words += f" --p-chunk {P_CHUNK} --d-chunk {D_CHUNK} --ttft-margin {TTFT_MARGIN}"
    words += f" --ttft-slo {DEMO_SLO.ttft} --tpot-slo {DEMO_SLO.tpot} --overload serve"
    return [str(model), *words.split(), "--devices", f"{cores[0]};{cores[-1]}"]


async def _serve_and_load(
    args: argparse.Namespace, console: Console, server: Subserver, began: float
) -> tuple[list[Row], dict[str, Any]]:
    with console.status("starting the server") as status:
        async for line in server.sayings():
            status.update(line)
    console.print(f"server   ready on {server.url} after {time.monotonic() - began:.0f} s")
    if args.page:
        await _show_page(args, console, server)
    load = Load(server.url, MODEL, DEMO_SLO, console)
    return await load.run(plan(args.requests, args.rate, args.seed))


async def _show_page(args: argparse.Namespace, console: Console, server: Subserver) -> None:
    """Requests without end, for whoever looks at the page; a signal ends it."""
    page = f"{server.url}/taichi/"
    console.print(f"page     {page} until Ctrl-C", soft_wrap=True)
    if can_open():
        await asyncio.to_thread(webbrowser.open, page)
    for seed in itertools.count(args.seed):
        await Load(server.url, MODEL, DEMO_SLO, console).run(plan(args.requests, args.rate, seed))


def can_open() -> bool:
    """Whether there is a desktop for a browser: a text browser would take the terminal."""
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(shown) or sys.platform == "darwin"


def report(rows: list[Row], state: dict[str, Any], path: str | None, console: Console) -> None:
    """Print the tables, and write the same as JSON if asked."""
    kinds = {instance["name"]: instance["kind"] for instance in state["instances"]}
    sums = totals(rows, state)
    console.print(tables.requests_table(rows, kinds, DEMO_SLO))
    console.print(tables.totals_table(sums, kinds, DEMO_SLO))
    for row in rows:
        if row.error is not None:
            console.print(f"request {row.number + 1} failed: {row.error}", style="red", markup=False)
    if path is not None:
        content = {"rows": [asdict(row) for row in rows], "totals": asdict(sums), "slo": asdict(DEMO_SLO)}
        text = json.dumps(content, indent=2) + "\n"
        if path == "-":
            sys.stdout.write(text)
        else:
            Path(path).write_text(text, encoding="utf-8")
            say_written([Path(path)], console)
