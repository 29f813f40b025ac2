"""`taichi explain ID`: where a request went, and why, as one readable table; its moves also as a picture.

It reads GET /taichi/requests/{id} of a running server, or the event log of one. Fields that a server does
not send are left out, so an older or newer one can be asked too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from taichi_serve.commands import timeline
from taichi_serve.commands.records import NoAnswerError, Record, asked, logged

Line = tuple[float | None, str, str]  # seconds since arrival, what happened or was decided, why


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
    parser = argparse.ArgumentParser(prog="taichi explain", description="Where a request went, and why.")
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


def lines(record: Record) -> Iterator[Line]:
    """The log in words. Facts have a time; a decision is made as soon as what it follows from is known."""
    for entry in record["log"]:
        at = entry["at"] - record["arrived_at"] if "at" in entry else None
        head, *forecasts = WORDS.get(entry["type"], _other)(entry)
        yield at, *head
        for what, why in forecasts:
            yield None, what, why


Words = list[tuple[str, str]]


def _arrived(entry: Record) -> Words:
    bound = entry.get("bound_by") or ("" if entry["movable"] else "cannot be moved exactly")
    why = f"{entry['prompt_tokens']} prompt tokens, at most {entry['max_tokens']} output"
    return [("arrived", f"{why}; stays on one instance: {bound}" if bound else why)]


def _prefill(entry: Record) -> Words:
    then = "decode elsewhere" if entry["hand_over"] else "decode there"
    rows = [(f"-> prefill on {entry['on']}, {then}", entry.get("why") or _chosen(entry))]
    return rows + _forecasts(entry, entry["on"])


def _forecasts(entry: Record, taken: str) -> Words:
    rows = []
    for forecast in entry["forecasts"]:
        verdict = "feasible" if forecast["feasible"] else "not feasible"
        if not forecast.get("fits", True):
            verdict = "no room in its KV"
        elif not forecast.get("calm", True):
            verdict = "its decodes are at their TPOT margin"
        queue = f"{forecast['queued_prefill_tokens']} prompt tokens queued"
        if cached := forecast.get("cached", 0):
            queue += f", {cached} of its own cached"
        why = f"TTFT {forecast['ttft'] * 1000:.0f} ms, {queue}: {verdict}"
        rows.append((_mark(forecast["instance"], taken), why))
    return rows


def _chosen(entry: Record) -> str:
    feasible = [f["instance"] for f in entry["forecasts"] if f["feasible"]]
    if not feasible:
        return "none is feasible: the lowest predicted TTFT" if entry["forecasts"] else ""
    if len(feasible) == 1:
        return "the only feasible one"
    return "feasible; D-heavy first, then the fewest prompt tokens to compute"


def _prefilled(entry: Record) -> Words:
    how = "its KV waits for the decode" if entry["held"] else "decodes here"
    fetched, loaded = entry.get("fetched", 0), entry.get("loaded", 0)  # an older server does not say
    came = f", {fetched} of these came from another instance" if fetched else ""
    came += f", {loaded} of these came from the memory of its host" if loaded else ""
    what = f"{entry['cached']} prompt tokens were cached{came}; {how}"
    return [(f"first token from {entry['instance']}", what)]


def _demote(entry: Record) -> Words:
    return [("-> best effort", entry["why"])]


def _decline(entry: Record) -> Words:
    why = f"{entry['why']}; it may come back after {entry['retry_after']:.1f} s"
    return [("-> turned away", why), *_forecasts(entry, "")]


def _ahead(entry: Record) -> Words:
    return [(f"-> copy its KV ahead to {entry['to']}", entry["why"])]


def _move(entry: Record) -> Words:
    target = entry.get("to") or entry["on"]
    rows = [(f"-> {entry['move']} to {target}", entry["why"])]
    for look in entry.get("outlooks", ()):
        why = f"TPOT {look['tpot'] * 1000:.1f} ms, KV {look['load']:.1%} once it is there"
        rows.append((_mark(look["instance"], target), why if look["fits"] else f"{why}, too full"))
    return rows


def _flowed(entry: Record) -> Words:
    came = f"{entry['kv_tokens']} tokens of KV came over"
    here = entry.get("reused", 0) - entry["kv_tokens"]
    if here > 0:
        came += f", {here} were still here"
    what = f"{entry['output_tokens']} tokens out; {came}, gap {entry['gap'] * 1000:.0f} ms"
    return [(f"goes on at {entry['instance']}", what)]


def _refused(entry: Record) -> Words:
    return [("move refused", entry["why"])]


def _finished(entry: Record) -> Words:
    return [(entry["outcome"], f"{entry['output_tokens']} tokens out")]


def _tuned(entry: Record) -> Words:
    gain = entry["gain"]
    predicted = "" if gain is None else f" ({gain:+.0%} good requests predicted)"
    return [("sliders set themselves" if entry["act"] else "sliders to be set", f"{entry['why']}{predicted}")]


def _other(entry: Record) -> Words:
    return [(entry["type"].lower(), entry.get("why", ""))]


def _mark(instance: str, taken: str) -> str:
    return f"   {'*' if instance == taken else ' '} {instance}"


WORDS = {
    "Arrived": _arrived,
    "Prefill": _prefill,
    "Prefilled": _prefilled,
    "Ahead": _ahead,
    "Demote": _demote,
    "Decline": _decline,
    "Decode": _move,
    "Flow": _move,
    "Flowed": _flowed,
    "Refused": _refused,
    "Finished": _finished,
    "Tuned": _tuned,
}
