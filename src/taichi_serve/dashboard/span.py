"""One stretch of a request's life, and the parts that a move has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from taichi_serve.messages import Timeline

Value = str | int | float | bool
GAP = "taichi.gap"  # seconds between the last token there and the first here


@dataclass(frozen=True, slots=True)
class Span:
    """From `began` to `ended` (seconds), with its `parts` within it; `wrong` says why it came to nothing."""

    name: str
    began: float
    ended: float
    attributes: Mapping[str, Value] = field(default_factory=dict)
    parts: tuple[Span, ...] = ()
    wrong: str | None = None


def moved(span: Span) -> bool:
    """Whether this is a move that came to its end: of others nobody knows a gap."""
    return GAP in span.attributes


def part(name: str, began: float, ended: float, attributes: Mapping[str, Value] | None = None) -> Span | None:
    """A part of a span; None where there was none. A time that is not known is 0."""
    return Span(name, began, ended, attributes or {}) if 0.0 < began <= ended else None


def of_move(line: Timeline, decided: float) -> list[Span | None]:
    """The parts of a move: the source is asked what it has, full blocks are copied while the request still
    runs there, it is told to leave and makes its last token, the rest is copied, and the target makes a
    token."""
    copy: dict[str, Value] = {"taichi.blocks": line.copied_blocks, "taichi.copy_seconds": line.copy_seconds}
    told = decided if decided <= line.left else 0.0  # a hand-over is decided when its first token is known
    over = line.landed if line.landed >= line.left else max(line.left, line.arrived)
    return [
        part("announce", told, line.ahead),
        part("copy ahead", line.ahead, line.copied),
        part("leave", max(told, line.copied), line.left),
        part("tail", line.left, line.landed, copy),
        part("landing", over, line.at),
    ]
