"""What a row of pairs came to: which chunk of stock is best, and the table of all. It reads the files that
`taichi bench goodput --compare` leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from taichi_serve.bench import report, usage
from taichi_serve.bench.contest import Contest
from taichi_serve.bench.kept import Kept, read
from taichi_serve.bench.pairs import Pair, pairs
from taichi_serve.commands.compare import FILE

TUNING = "tune-"  # how folders begin in which two chunks of stock are compared
HEADS = (
    *("workload", "SLO", "contender", "goodput, requests/s", "attainment there (95 %)"),
    *("TTFT p50 / p90, s", "TPOT p50 / p90, ms", "goodput over stock's (95 %)", "verdict"),
    *("more of the same requests good (95 %)", *usage.HEADS[2:], "rounds"),
)


def uphill(
    better: Callable[[int, int], bool | None], ladder: Sequence[int], first: int
) -> int | tuple[int, int]:
    """The best of a ladder with one summit, or which two are to be compared next. `better` says whether the
    second of two neighbours is better than the first; None where that is not known yet."""
    begun = best = ladder.index(first)
    for step in (1, -1):
        while 0 <= best + step < len(ladder):
            found = better(ladder[best], ladder[best + step])
            if found is None:
                return ladder[best], ladder[best + step]
            if not found:
                break
            best += step
        if best != begun:
            break
    return ladder[best]


def ahead(contest: Contest, first: str, second: str) -> bool | None:
    """Whether the second of two contenders is better; None while more rounds would say."""
    if contest.next() is not None:
        return None
    (pair,) = pairs(contest)
    if pair.ratio is None:  # no goodput, or one without an end
        return contest.goodput(second).rate > contest.goodput(first).rate
    return pair.ratio.value < 1.0 if pair.second == second else pair.ratio.value > 1.0


def tuning(first: int, second: int) -> str:
    """The folder in which two chunks of stock are compared."""
    return f"{TUNING}{min(first, second)}-{max(first, second)}"


def kept_pairs(out: Path) -> Iterator[Kept]:
    """Every pair with stock, as far as it is measured."""
    for path in sorted(out.glob(f"*/*/{FILE}")):
        if not path.parent.name.startswith(TUNING) and (kept := read(path)) is not None:
            yield kept


def rows(kept: Kept) -> Iterator[tuple[str, ...]]:
    """Under HEADS: every contender, and what it is over the first one, which is stock."""
    contest, trial = kept.contest, kept.trial
    what = trial.workload if trial.arrivals.cv == 1.0 else f"{trial.workload}, {trial.arrivals.words}"
    slo = f"{trial.slo.ttft:g} s, {trial.slo.tpot * 1e3:g} ms"
    took = {row[0]: row[2:] for row in usage.rows(contest)}
    unknown = ("-",) * len(usage.HEADS[2:])
    done = f"{len(kept.rounds)}" if contest.next() is None else f"{len(kept.rounds)}, not done"
    beside = {pair.second: pair for pair in pairs(contest) if pair.first == contest.names[0]}
    for result in kept.results:
        cells = dict(zip(report.HEADS, report.row(result), strict=True))
        shown = [cells[head] for head in HEADS[3:7]]
        pair = beside.get(result.name)
        against = ("-", "-", "-") if pair is None else over(contest, pair)
        yield (what, slo, result.name, *shown, *against, *took.get(result.name, unknown), done)


def over(contest: Contest, pair: Pair) -> tuple[str, str, str]:
    """The second contender over the first: goodputs, a verdict, and the same requests at the higher of the
    two goodputs, or the rate next to it that both saw whole."""
    ratio, verdict = "-", "one of them is only a bound"
    if pair.ratio is not None:
        low, value, high = 1 / pair.ratio.high, 1 / pair.ratio.value, 1 / pair.ratio.low
        ratio = f"{value:.3f} ({low:.3f} to {high:.3f})"
        verdict = {"ahead": "behind", "behind": "ahead"}.get(pair.ratio.verdict, pair.ratio.verdict)
    if not pair.differences:
        return ratio, verdict, "-"
    rate = max(contest.goodput(name).rate for name in (pair.first, pair.second))
    there = min(pair.differences, key=lambda one: abs(one.rate - rate))
    more = f"{-there.share:+.1%} ({-there.high:+.1%} to {-there.low:+.1%}) at {there.rate:.3g}/s"
    return ratio, verdict, more


def table(out: Path) -> str:
    """All pairs so far, in Markdown."""
    every = [HEADS, ("---",) * len(HEADS), *(row for kept in kept_pairs(out) for row in rows(kept))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in every) + "\n"
