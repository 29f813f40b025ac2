"""`taichi explain ID`: where a request of a running server went, and why, as one readable table.

It reads GET /taichi/requests/{id}. Fields that a server does not send are left out, so an older or newer one
can be asked too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import httpx
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

Record = dict[str, Any]
Line = tuple[float | None, str, str]  # seconds since arrival, what happened or was decided, why


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which request, and of which server."""
    parser.add_argument("id", help='the id in the OpenAI response, as in "chatcmpl-..."')
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY"), help="(default: $OPENAI_API_KEY)"
    )


def main(argv: list[str]) -> int:
    """`taichi explain` with these words; the exit status."""
    parser = argparse.ArgumentParser(prog="taichi explain", description="Where a request went, and why.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    errors = Console(stderr=True, highlight=False)
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    try:
        url = f"{args.url.rstrip('/')}/taichi/requests/{args.id}"
        answer = httpx.get(url, headers=headers, timeout=10.0)
        content = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as wrong:
        errors.print(f"explain: no answer from {args.url}: {wrong}", soft_wrap=True, markup=False)
        return 1
    if answer.status_code != 200:
        errors.print(f"explain: {_message(content, answer.status_code)}", soft_wrap=True, markup=False)
        return 1
    console = Console(highlight=False)
    for record in content["requests"]:
        console.print(render(record))
    return 0


def _message(content: Any, status: int) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    return str(error["message"]) if isinstance(error, dict) and "message" in error else f"HTTP {status}"


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
    for forecast in entry["forecasts"]:
        verdict = "feasible" if forecast["feasible"] else "not feasible"
        verdict = verdict if forecast.get("fits", True) else "no room in its KV"
        queue = f"{forecast['queued_prefill_tokens']} prompt tokens queued"
        why = f"TTFT {forecast['ttft'] * 1000:.0f} ms, {queue}: {verdict}"
        rows.append((_mark(forecast["instance"], entry["on"]), why))
    return rows


def _chosen(entry: Record) -> str:
    feasible = [f["instance"] for f in entry["forecasts"] if f["feasible"]]
    if not feasible:
        return "none is feasible: the lowest predicted TTFT" if entry["forecasts"] else ""
    if len(feasible) == 1:
        return "the only feasible one"
    return "feasible; D-heavy first, then the fewest queued prompt tokens"


def _prefilled(entry: Record) -> Words:
    how = "its KV waits for the decode" if entry["held"] else "decodes here"
    return [(f"first token from {entry['instance']}", f"{entry['cached']} prompt tokens were cached; {how}")]


def _move(entry: Record) -> Words:
    target = entry.get("to") or entry["on"]
    rows = [(f"-> {entry['move']} to {target}", entry["why"])]
    for look in entry.get("outlooks", ()):
        why = f"TPOT {look['tpot'] * 1000:.1f} ms, KV {look['load']:.1%} once it is there"
        rows.append((_mark(look["instance"], target), why if look["fits"] else f"{why}, too full"))
    return rows


def _flowed(entry: Record) -> Words:
    came = f"{entry['kv_tokens']} tokens of KV came over, gap {entry['gap'] * 1000:.0f} ms"
    return [(f"goes on at {entry['instance']}", f"{entry['output_tokens']} tokens out; {came}")]


def _finished(entry: Record) -> Words:
    return [(entry["outcome"], f"{entry['output_tokens']} tokens out")]


def _other(entry: Record) -> Words:
    return [(entry["type"].lower(), entry.get("why", ""))]


def _mark(instance: str, taken: str) -> str:
    return f"   {'*' if instance == taken else ' '} {instance}"


WORDS = {
    "Arrived": _arrived,
    "Prefill": _prefill,
    "Prefilled": _prefilled,
    "Decode": _move,
    "Flow": _move,
    "Flowed": _flowed,
    "Finished": _finished,
}
