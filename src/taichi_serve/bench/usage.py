"""What a visit took besides time: processor time of the server, energy and memory of the GPUs, moves.

Figures are told for the visits in which a contender was seen whole at its goodput. What is sent before the
requests that count is in them, for every contender alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taichi_serve.bench.contest import Contest, Visit

HEADS = (
    "contender",
    "at requests/s",
    "processor s a good request",
    "joules a good request",
    "GPU memory, GiB",
    "moves of all requests",
)


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one visit; None where nobody can say. `cpu` is processor seconds of the server and all below it,
    `joules` the energy of all GPUs while it was visited (what idle servers beside it take is in it),
    `gpu_bytes` what its start took of their memory, `moves` counts requests that moved, by why."""

    cpu: float | None = None
    joules: float | None = None
    gpu_bytes: int | None = None
    moves: dict[str, int] = field(default_factory=dict)


def rows(contest: Contest) -> list[tuple[str, ...]]:
    """Under HEADS, one for each contender of which something is known."""
    found = ((name, _rate(contest, name), _visits(contest, name)) for name in contest.names)
    return [(name, rate, *_cells(visits)) for name, rate, visits in found if visits]


def lines(contest: Contest) -> list[str]:
    """The same for a terminal of any width."""
    return [
        f"{name} at {rate} requests/s: {cpu} s of processor time and {joules} J a good request, "
        f"{memory} GiB of GPU memory, moves {moves}"
        for name, rate, cpu, joules, memory, moves in rows(contest)
    ]


def markdown(contest: Contest) -> str:
    """The table; nothing where nothing is known."""
    if not (made := rows(contest)):
        return ""
    table = [HEADS, ("---", *("---:" for _ in HEADS[2:]), "---"), *made]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n"


def _rate(contest: Contest, name: str) -> str:
    low = contest.climb(name).low
    return "-" if low is None else f"{contest.grid.rate(low):.3g}"


def _visits(contest: Contest, name: str) -> list[Visit]:
    low = contest.climb(name).low
    there = (visit for done in contest.rounds if done.rung == low for visit in done.visits)
    return [visit for visit in there if visit.name == name and visit.run.whole and visit.usage is not None]


def _cells(visits: Sequence[Visit]) -> tuple[str, ...]:
    used = [visit.usage for visit in visits if visit.usage is not None]
    good = sum(visit.run.good for visit in visits)
    moves = sum((Counter(usage.moves) for usage in used), Counter[str]())
    memory = used[-1].gpu_bytes
    return (
        _each([usage.cpu for usage in used], good),
        _each([usage.joules for usage in used], good),
        "-" if memory is None else f"{memory / 2**30:.1f}",
        ", ".join(f"{why} {count}" for why, count in moves.items()) or "-",
    )


def _each(amounts: Sequence[float | None], good: int) -> str:
    known = [amount for amount in amounts if amount is not None]
    return f"{sum(known) / good:.3g}" if good and len(known) == len(amounts) else "-"
