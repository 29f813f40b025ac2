"""The moves of one request as a picture: what happened when, on the source, in the server, on the target.

It reads the record of a request (GET /taichi/requests/{id}, or the same out of an event log). Times are
seconds since the source made its last token; only the picture has milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from taichi_serve.bench.figure import save, stacked
from taichi_serve.messages import Move

SUFFIXES = (".png", ".svg")
MOST = 40  # panels; a picture of more could not be looked at
SHORTEST = 5e-6  # seconds of a bar; below, its length would read as nothing

Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Bar:
    """One part of a move: in which row, what, from when to when."""

    row: str
    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Moved:
    """One move, ready to be drawn. `gap`: from when the server had the last token to when it had the next."""

    leg: int
    why: str
    source: str
    target: str
    kv_tokens: int
    gap: Span
    bars: tuple[Bar, ...]


WAIT = "waits for the running step to end"
# The rows, from top to bottom, and their colours.
SOURCE, SERVER, TARGET = "source", "server", "target"
COLOURS = {SOURCE: "#dd8452", SERVER: "#8172b3", TARGET: "#4c72b0"}


def moves(record: dict[str, Any]) -> list[Moved]:
    """Every move of the record whose timeline is known: one that the target did not report on has none."""
    why = {entry["leg"]: entry["move"] for entry in record["log"] if "move" in entry}
    found = []
    for before, leg in pairwise(record["legs"]):
        if not leg.get("timeline"):
            continue
        times = {name: float(at or 0.0) for name, at in leg["timeline"].items()}
        move = why.get(leg["leg"], "move")
        if move == Move.RESCUE.value:  # the source was lost, and could say nothing of its last token
            times["left"] = 0.0
        since = times["left"] or times["heard"]
        gap = times["heard"] - since, times["at"] - since
        source, target = before["instance"], leg["instance"]
        made = tuple(bars(times))
        found.append(Moved(leg["leg"], move, source, target, leg["kv_tokens"], gap, made))
    return found


def bars(times: dict[str, float]) -> Iterator[Bar]:
    """The parts of one move. A part did not take place when its beginning or end is 0.0 or missing, and
    none is shown that took no time: no block may have been left to copy ahead.

    What the target waits for beside the copy is the end of the step that runs there: once the tail of what
    was copied ahead has landed; else when the request comes, and again when its KV has landed.
    """
    since = times.get("left") or times["heard"]
    copy = "copy of the tail" if times.get("ahead") else "copy"
    there = "landed" if times.get("ahead") and times.get("landed") else "arrived"
    spans = [
        (SERVER, "heard by the server", "left", "heard"),
        (TARGET, "copied ahead", "ahead", "copied"),
        (SERVER, "sent to the target", "heard", "arrived"),
        (TARGET, copy, "began", "landed"),
        (TARGET, WAIT, there, "scheduled"),
        (TARGET, "step", "scheduled", "made"),
        (SERVER, "heard by the server", "made", "at"),
    ]
    copying = times.get("began", 0.0), times.get("landed", 0.0)
    for row, name, start, end in spans:
        span = times.get(start, 0.0), times.get(end, 0.0)
        for first, last in without(span, copying) if name == WAIT else [span]:
            if first > 0.0 and last - first >= SHORTEST:
                yield Bar(row, name, first - since, last - since)


def without(span: Span, taken: Span) -> list[Span]:
    """What is left of `span` where `taken` does not lie over it; an empty `taken` takes nothing."""
    if taken[0] >= taken[1]:
        return [span]
    return [(span[0], min(span[1], taken[0])), (max(span[0], taken[1]), span[1])]


# ---------------------------------------------------------------------------------------- the picture


def draw(shown: Sequence[Moved], title: str, path: Path) -> None:
    """One panel for each move, below one another."""
    lanes = [len(move.bars) + 2 for move in shown]
    picture, panels = stacked([0.24 * count + 1.0 for count in lanes])
    picture.suptitle(title, fontsize="medium")
    for panel, move in zip(panels, shown, strict=True):
        _panel(panel, move)
    panels[-1].set_xlabel("milliseconds since the last token at the source")
    save(picture, path)


def view(move: Moved) -> Span:
    """From when to when the picture goes. What was copied long before the gap is cut off, or it would
    leave no room for the gap itself."""
    end = max([move.gap[1], *(bar.end for bar in move.bars)])
    start = max(-0.8 * end, min([0.0, *(bar.start for bar in move.bars)]))
    margin = 0.16 * (end - start)  # room for what came before and comes after
    return start - margin, end + margin


def _panel(axis: Any, move: Moved) -> None:
    start, end = (at * 1e3 for at in view(move))
    lane = 0
    for row, name in (
        (SOURCE, f"source {move.source}"),
        (SERVER, "server"),
        (TARGET, f"target {move.target}"),
    ):
        here = sorted((bar for bar in move.bars if bar.row == row), key=lambda bar: bar.start)
        top, lane = lane, lane + len(here) + (row != SERVER)
        axis.axhspan(top - 0.5, lane - 0.5, color=COLOURS[row], alpha=0.08, linewidth=0)
        axis.text(start, (top + lane - 1) / 2, f"{name} ", ha="right", va="center", color=COLOURS[row])
        if row == SOURCE:
            _decodes(axis, top, (start, 0.0), row)
        for offset, bar in enumerate(here):
            _bar(axis, top + offset, bar, (start, end))
        if row == TARGET:
            _decodes(axis, lane - 1, (max([0.0, *(bar.end for bar in here)]) * 1e3, end), row)
    _gap(axis, move, lane)
    axis.set(xlim=(start, end), ylim=(lane + 0.7, -0.5), yticks=[])
    came = f"{move.kv_tokens} tokens of KV came over"
    axis.set_title(f"{move.why} from {move.source} to {move.target}: {came}", fontsize="small", loc="left")
    axis.spines[["top", "right", "left"]].set_visible(False)


def _decodes(axis: Any, lane: int, span: Span, row: str) -> None:
    """Before and after the move the request is in every step of its instance."""
    axis.barh(lane, span[1] - span[0], left=span[0], height=0.7, color=COLOURS[row], alpha=0.3)
    axis.text(sum(span) / 2, lane, "decodes", ha="center", va="center", fontsize="small")


def _bar(axis: Any, lane: int, bar: Bar, view: Span) -> None:
    """The bar with its name and length: in it where it is long, else on the side where there is more room."""
    start, end = max(bar.start * 1e3, view[0]), max(bar.end * 1e3, view[0])
    axis.barh(lane, end - start, left=start, height=0.7, color=COLOURS[bar.row])
    text = f" {bar.name} {length(bar.end - bar.start)} "
    if bar.start * 1e3 < view[0]:
        text = f" \N{LEFTWARDS ARROW}{text}(it began at -{length(-bar.start)})"
    if end - start > 0.45 * (view[1] - view[0]):
        axis.text((start + end) / 2, lane, text, ha="center", va="center", fontsize="small", color="white")
    elif view[1] - end > start - view[0]:
        axis.text(end, lane, text, ha="left", va="center", fontsize="small")
    else:
        axis.text(start, lane, text, ha="right", va="center", fontsize="small")


def _gap(axis: Any, move: Moved, lane: int) -> None:
    """The two tokens as the server has them, and what is between them."""
    first, second = (at * 1e3 for at in move.gap)
    for at in (first, second):
        axis.axvline(at, color="grey", linewidth=0.8, linestyle=":")
    arrow = {"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0, "linewidth": 0.8}
    axis.annotate("", (first, lane), (second, lane), arrowprops=arrow)
    text = f"gap {length(move.gap[1] - move.gap[0])}"
    axis.text((first + second) / 2, lane + 0.1, text, ha="center", va="top", fontsize="small")


def length(seconds: float) -> str:
    """In milliseconds, to three digits."""
    ms = seconds * 1e3
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 10 else f"{ms:.2f} ms"
