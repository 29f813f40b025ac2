"""The demo's tables, for a terminal of at least 80 columns."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from taichi_serve.commands.rows import Row, Totals
from taichi_serve.slo import SLO

COLORS = {"P-heavy": "magenta", "D-heavy": "cyan"}
Kinds = Mapping[str, str]  # instance name -> kind


def instance(name: str, kinds: Kinds) -> Text:
    """An instance in the colour of its kind."""
    return Text(name, style=COLORS.get(kinds.get(name, ""), ""))


def seconds(value: float | None) -> str:
    """A time in milliseconds."""
    return "-" if value is None else f"{value * 1000:.0f}"


def requests_table(rows: list[Row], kinds: Kinds, slo: SLO) -> Table:
    """One line for each request, in the order they were sent."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
    names = "#", "kind", "prompt\ntokens", "output\ntokens", "prefill", "decode", "moves", "TTFT\nms"
    for name in (*names, "TPOT\nms", "good"):
        justify: JustifyMethod = "right" if "\n" in name or name == "#" else "left"
        table.add_column(
            name, justify=justify, no_wrap=name != "moves", min_width=len(name) if name == "good" else None
        )
    for row in rows:
        table.add_row(
            str(row.number + 1),
            row.kind,
            str(row.prompt_tokens),
            str(row.output_tokens),
            instance(row.prefilled, kinds),
            Text(" > ").join(instance(name, kinds) for name in row.decoded),
            ", ".join(hop.move for hop in row.hops),
            _against(row.ttft, slo.ttft),
            _against(row.tpot, slo.tpot),
            _verdict(row),
        )
    return table


def _against(value: float | None, limit: float) -> Text:
    return Text(seconds(value), style="red" if value is None or value > limit else "")


def _verdict(row: Row) -> Text:
    if row.error is not None:
        return Text("failed", style="bold red")
    return Text("yes", style="green") if row.good else Text("no", style="yellow")


def totals_table(sums: Totals, kinds: Kinds, slo: SLO) -> Table:
    """The sums, one a line."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    share = sums.good / sums.requests if sums.requests else 0.0
    within = f"TTFT within {slo.ttft:g} s and TPOT within {slo.tpot * 1000:g} ms"
    table.add_row("good", f"{sums.good} of {sums.requests} ({share:.0%}): {within}")
    if sums.failed:
        table.add_row("failed", Text(str(sums.failed), style="bold red"))
    table.add_row("tokens", f"{sums.prompt_tokens} in, {sums.output_tokens} out")
    places = [
        Text.assemble(instance(name, kinds), f" ({kinds.get(name, '?')}) {count}")
        for name, count in sums.prefilled.items()
    ]
    table.add_row("prefilled on", Text(", ").join(places))
    moves = ", ".join(f"{move} {count}" for move, count in sorted(sums.moves.items()))
    table.add_row("moves", moves or "none")
    table.add_row("KV moved", f"{sums.moved_bytes / 2**20:.1f} MiB")
    table.add_row("medians", f"TTFT {seconds(sums.ttft)} ms, TPOT {seconds(sums.tpot)} ms")
    table.add_row(
        "", f"gap of a move {seconds(sums.median_gap)} ms, from the last token here to the first there"
    )
    return table
