"""What `taichi top` knows of a server: the updates so far put together, and as tables of a terminal."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from taichi_serve.commands.tables import COLORS
from taichi_serve.dashboard.rows import Glance, Hop, Live, Note, Standing, Update

HOPS, NOTES = 10, 6  # that are shown
BAR = 8  # characters
COLUMNS = {
    "": 2,
    "kind": 7,
    "chunk": 5,
    "KV": 13,
    "running": 7,
    "queued": 6,
    "in/s": 5,
    "out/s": 5,
    "state": 15,
}


@dataclass
class Picture:
    """Fed with updates. Rates are tokens a second, since the look before."""

    at: float = 0.0
    standing: Standing | None = None
    instances: dict[str, Glance] = field(default_factory=dict)
    requests: dict[str, Live] = field(default_factory=dict)
    hops: deque[Hop] = field(default_factory=lambda: deque(maxlen=HOPS))
    notes: deque[Note] = field(default_factory=lambda: deque(maxlen=NOTES))
    _before: dict[str, tuple[float, int, int]] = field(default_factory=dict)
    _rates: dict[str, tuple[float, float]] = field(default_factory=dict)

    def apply(self, update: Update) -> None:
        """Take what changed."""
        if update.whole:
            self.instances, self.requests, self._before = {}, {}, {}
            self.notes.clear()
        self.at, self.standing = update.at, update.standing or self.standing
        self.instances |= {one.name: one for one in update.instances}
        for one in update.instances:
            self._rate(one)
        self.requests |= {one.id: one for one in update.requests}
        for name in update.gone:
            self.requests.pop(name, None)
        self.hops += update.hops
        self.notes += update.notes

    def rates(self, one: Glance) -> tuple[float, float]:
        """Prompt tokens and output tokens a second of an instance, over a second or more."""
        return self._rates.get(one.name, (0.0, 0.0))

    def _rate(self, one: Glance) -> None:
        at, taken, made = self._before.setdefault(one.name, (self.at, one.prefill_tokens, one.output_tokens))
        if (passed := self.at - at) >= 1:
            self._rates[one.name] = (one.prefill_tokens - taken) / passed, (one.output_tokens - made) / passed
            self._before[one.name] = self.at, one.prefill_tokens, one.output_tokens


def render(seen: Picture, link: str) -> RenderableType:
    """The whole of it, for a terminal of at least 80 columns."""
    if seen.standing is None:
        return Text(link)
    kinds = {name: one.kind for name, one in seen.instances.items()}
    return Group(
        _head(seen, seen.standing, link),
        _instances(seen),
        _attainment(seen.standing),
        Text("  ".join(f"{move} {count}" for move, count in seen.standing.moves.items()), style="bold"),
        *(_hop(seen, hop, kinds) for hop in reversed(seen.hops)),
        *(_note(seen, one) for one in reversed(seen.notes)),
    )


def _head(seen: Picture, standing: Standing, link: str) -> Text:
    words = f"{link}   TTFT {standing.ttft:g} s, TPOT {standing.tpot * 1000:g} ms   "
    words += f"{len(seen.requests)} live, {standing.accepted} in all"
    return Text(words + ("" if standing.autotune == "off" else f"   autotune {standing.autotune}"))


def _instances(seen: Picture) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, width in COLUMNS.items():
        side: JustifyMethod = "left" if name in ("", "kind", "KV", "state") else "right"
        table.add_column(name, justify=side, no_wrap=True, min_width=width)
    for one in seen.instances.values():
        taken, made = seen.rates(one)
        share = one.kv_tokens / one.kv_capacity if one.kv_capacity else 0.0
        full = round(BAR * min(1.0, share))
        color = COLORS.get(one.kind, "")
        table.add_row(
            Text(one.name, style=f"bold {color}"),
            Text(one.kind, style=color),
            str(one.chunk),
            Text("█" * full, style=color) + Text("░" * (BAR - full) + f" {share:.0%}", style="dim"),
            str(one.running),
            str(one.queued_prefill_tokens),
            f"{taken:.0f}",
            f"{made:.0f}",
            _condition(one),
        )
    return table


def _condition(one: Glance) -> Text:
    if not one.alive:
        back = "lost for good" if one.back_in is None else f"back in {one.back_in:.0f} s"
        return Text(back, style="bold red")
    if one.silent:
        return Text("does not answer", style="bold red")
    if one.draining:
        return Text("drained", style="bold")
    return Text(f"restarted {one.restarts}x" if one.restarts else "up", style="dim")


def _attainment(standing: Standing) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("attainment", "both SLOs", "TTFT", "TPOT", "requests"):
        table.add_column(name, justify="left" if name == "attainment" else "right")
    for name, (requests, *shares) in standing.windows.items():
        cells = ["-" if share is None else f"{share:.1%}" for share in shares]
        table.add_row(f"last {name.replace('_', ' ')}", *cells, str(requests))
    return table


def _hop(seen: Picture, hop: Hop, kinds: dict[str, str]) -> Text:
    gap = "" if hop.gap is None else f", gap {hop.gap * 1000:.0f} ms"
    return Text.assemble(
        (f"{seen.at - hop.at:5.0f} s ", "dim"),
        f"{hop.move:<10}",
        (hop.source or "lost", COLORS.get(kinds.get(hop.source or "", ""), "red")),
        " > ",
        (hop.target, COLORS.get(kinds.get(hop.target, ""), "")),
        f"  {hop.id}",
        (f"  {hop.kv_tokens} tokens of KV{gap}", "dim"),
    )


def _note(seen: Picture, one: Note) -> Text:
    style = {"bad": "red", "good": "green"}.get(one.tone, "")
    return Text.assemble((f"{seen.at - one.at:5.0f} s ", "dim"), (one.text, style))
