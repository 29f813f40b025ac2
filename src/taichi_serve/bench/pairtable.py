"""Pairs of contenders as a table, in Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from taichi_serve.bench.contest import Contest
from taichi_serve.bench.pairs import Difference, Pair
from taichi_serve.bench.probe import drift
from taichi_serve.bench.score import DRIFT

HEADS = (
    "pair",
    "goodput ratio (95 %)",
    "verdict",
    "at requests/s",
    "good of the same requests, difference (95 %)",
    "good for one only",
)


def rows(pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
    """Under HEADS, one for each common rate of each pair, and at least one for each pair."""
    found: list[tuple[str, ...]] = []
    for pair in pairs:
        first = (f"{pair.first} / {pair.second}", *_ratio(pair))
        each = [_difference(one) for one in pair.differences] or [("-", "-", "-")]
        found += [(*first, *each[0]), *(("", "", "", *more) for more in each[1:])]
    return found


def lines(pairs: Sequence[Pair]) -> list[str]:
    """The same for a terminal of any width."""
    found = []
    for pair in pairs:
        ratio, verdict = _ratio(pair)
        found.append(f"{pair.first} / {pair.second}: goodput {ratio}, {verdict}")
        for one in pair.differences:
            rate, share, only = _difference(one)
            found.append(f"  at {rate} requests/s: {share} of the same requests good, {only} for one only")
    return found


def _ratio(pair: Pair) -> tuple[str, str]:
    if (ratio := pair.ratio) is None:
        return "-", "one of them is only a bound"
    return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})", ratio.verdict


def _difference(one: Difference) -> tuple[str, str, str]:
    return (
        f"{one.rate:.3g}",
        f"{one.share:+.1%} ({one.low:+.1%} to {one.high:+.1%})",
        f"{one.only_first} and {one.only_second} of {one.requests}",
    )


def machine(contest: Contest) -> str:
    """How the machine's speed moved, in one sentence."""
    speeds = [speed for done in contest.rounds for speed in done.speeds]
    if not speeds:
        return "The machine's speed was not probed."
    again = sum(len(done.thrown_away) for done in contest.rounds)
    moved = sum(done.drift > DRIFT for done in contest.rounds)
    most = max(done.drift for done in contest.rounds)
    idle = max((share for done in contest.rounds for share in done.idle), default=0.0)
    return (
        f"The machine's speed moved by {drift(speeds):.1%} over all {len(contest.rounds)} rounds, and by "
        f"{most:.1%} at most within one that counts; done again {again}, kept though it moved by more than "
        f"{DRIFT:.0%} {moved}. Idle servers used {idle:.3f} cores at most."
    )


def markdown(contest: Contest, pairs: Sequence[Pair]) -> str:
    """The table, and how the machine's speed moved."""
    lines = [HEADS, ("---", "---:", "---", "---:", "---:", "---:"), *rows(pairs)]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", machine(contest)]) + "\n"


def as_json(contest: Contest, pairs: Sequence[Pair]) -> bytes:
    """The pairs with all figures, and the same sentence."""
    found: list[dict[str, Any]] = [
        msgspec.to_builtins(pair) | {"verdict": pair.ratio.verdict if pair.ratio else None} for pair in pairs
    ]
    made = {"pairs": found, "machine": machine(contest)}
    return msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n"
