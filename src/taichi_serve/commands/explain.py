"""`taichi explain ID`: where a request went, and why, as one readable table; its moves also as a picture.

It reads GET /taichi/requests/{id} of a running server, or the event log of one. Fields that a server does
not send are left out, so an older or newer one can be asked too.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from taichi_serve.commands import timeline
from taichi_serve.commands.helping import EachDefaultOnce
from taichi_serve.commands.progress import working
from taichi_serve.commands.records import NoAnswerError, Record, asked, logged
from taichi_serve.dashboard.story import lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which request, of which server, and what is wanted of it."""
    parser.add_argument("id", help='the id in the OpenAI response, as in "chatcmpl-..."')
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    where.add_argument("--log", type=Path, metavar="FILE", help="read this event log, and ask no server")
    parser.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY"), help="(default: $OPENAI_API_KEY)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw a timeline of every move there (.png or .svg)"
    )


def main(argv: list[str]) -> int:
    """`taichi explain` with these words; the exit status."""
    parser = argparse.ArgumentParser(
        prog="taichi explain",
        description="Where a request went, and why.",
        formatter_class=EachDefaultOnce,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    errors = Console(stderr=True, highlight=False)
    try:
        explain(args, Console(highlight=False))
    except NoAnswerError as wrong:
        errors.print(f"explain: {wrong}", soft_wrap=True, markup=False)
        return 1
    except OSError as wrong:
        errors.print(f"explain: {wrong.filename}: {wrong.strerror}", soft_wrap=True, markup=False)
        return 2
    except ValueError as wrong:
        errors.print(f"explain: {wrong}", soft_wrap=True, markup=False)
        return 2
    except (LookupError, TypeError, AttributeError) as wrong:
        said = f"explain: this version cannot read the record of {args.id}: {type(wrong).__name__}: {wrong}"
        errors.print(said, soft_wrap=True, markup=False)
        return 2
    return 0


def explain(args: argparse.Namespace, console: Console) -> None:
    """Draw if that is wanted, and print the tables; ValueError says what is wrong with the input."""
    if args.plot and args.plot.suffix not in timeline.SUFFIXES:
        raise ValueError(f"--plot {args.plot}: the name must end in {' or '.join(timeline.SUFFIXES)}")
    with working(Console(stderr=True), f"reading {args.log}" if args.log else f"asking {args.url}"):
        records = logged(args.log, args.id) if args.log else asked(args.url, args.id, args.api_key)
    drawn = _plot(records, args.id, args.plot) if args.plot else None
    for record in records:
        console.print(render(record))
    if drawn:
        console.print(drawn, soft_wrap=True, markup=False)


def _plot(records: list[Record], name: str, path: Path) -> str:
    """Draw the moves, and say where they are."""
    found = [move for record in records for move in timeline.moves(record)]
    if not found:
        moved = any(leg["gap"] is not None for record in records for leg in record["legs"])
        why = "no timeline of its moves was recorded" if moved else "it did not move"
        raise ValueError(f"nothing to draw of {name}: {why}")
    shown = found[: timeline.MOST]
    timeline.draw(shown, f"request {name}", path)
    first = "" if len(shown) == len(found) else f"the first {len(shown)} of "
    return f"{path}: {first}{len(found)} move{'s' * (len(found) > 1)}"


def render(record: Record) -> RenderableType:
    """One request: its legs, then every fact and decision in order, each with its forecasts."""
    return Group(Text(f"request {record['id']}", style="bold"), _legs(record), _log(record))


def _table(*names: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, justify="right" if name in right else "left")
    return table


def _legs(record: Record) -> Table:
    names = (
        "leg",
        "instance",
        "begins with",
        "first token at (s)",
        "output tokens",
        "KV tokens moved",
        "gap (ms)",
    )
    table = _table(*names, right=("leg", *names[3:]))
    for leg in record["legs"]:
        gap = leg["gap"]
        table.add_row(
            str(leg["leg"]),
            leg["instance"],
            "its prompt" if leg["kind"] == "prefill" else "a move",
            f"{leg['first_token_at'] - record['arrived_at']:.3f}",
            str(leg["output_tokens"]),
            "" if gap is None else str(leg["kv_tokens"]),
            "" if gap is None else f"{gap * 1000:.0f}",
        )
    return table


def _log(record: Record) -> Table:
    table = _table("at (s)", "what", "why", right=("at (s)",))
    for at, what, why in lines(record):
        table.add_row(
            "" if at is None else f"{at:.3f}", Text(what, style="bold" if "->" in what else ""), why
        )
    return table
