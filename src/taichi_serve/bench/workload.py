"""Seeded workloads: what is asked (lengths.py, conversations.py), and when (arrivals.py).

Chance lives here and nowhere else. Arrivals and lengths have a stream of random numbers each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.compound import compound
from taichi_serve.bench.conversations import LENGTHS, Conversations, Talks
from taichi_serve.bench.lengths import Independent, InOrder, LogNormal, Rows, Source, Synthetic
from taichi_serve.bench.mix import Mix
from taichi_serve.bench.sharing import requests as in_order
from taichi_serve.bench.trace import Trace
from taichi_serve.bench.traces import read_trace
from taichi_serve.cluster.simulated.job import Call


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked, and when, and of which class."""

    name: str
    source: Source
    arrivals: Arrivals = Arrivals()
    mix: Mix = Mix()
    note: str = ""  # what whoever reads the figures must know of the workload

    @property
    def block_size(self) -> int:
        """How many tokens a hash of Call.blocks covers."""
        return self.source.block_size

    @property
    def shares(self) -> bool:
        """Whether it says which requests begin alike."""
        if isinstance(self.source, InOrder):
            return bool(self.source.trace.blocks)
        return not isinstance(self.source, Independent)

    def calls(self, rate: float, requests: int, seed: int) -> Iterator[Call]:
        """Calls at `rate` requests/s in order of time, `requests` of them with all turns that follow."""
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"rate must be a positive number of requests/s, not {rate!r}")
        return self.mix.over(self.source.calls(self.arrivals, rate, requests, seed), seed)

    def requests(self, rate: float, requests: int, seed: int) -> list[Call]:
        """The same, and all turns among them, in order of time if answers took no time."""
        return [call for _, call in in_order(self.calls(rate, requests, seed))]

    def means(self, draws: int = 4000, seed: int = 0) -> tuple[float, float]:
        """Mean prompt and output length (tokens) over some draws."""
        pairs = [(c.prompt_tokens, c.output_tokens) for c in self.requests(1.0, draws, seed)]
        return sum(p for p, _ in pairs) / len(pairs), sum(o for _, o in pairs) / len(pairs)


# Means of the paper; the spread is ours: public conversations and summaries have about this one.
SYNTHETIC = {
    "sharegpt": Synthetic(LogNormal(661, 1.0, 8192), LogNormal(257, 0.8, 2048)),
    "summarization": Synthetic(LogNormal(7317, 0.5, 28000), LogNormal(201, 0.5, 2048)),
}
CONVERSATIONS = "conversations"
KNOWN = (*sorted((*SYNTHETIC, CONVERSATIONS)), "1200/100", "mix:...", "change:...")

MEANS = re.compile(r"(\d+)/(\d+)")
SPREAD, TAIL = 0.6, 8  # of lengths of which only the means are given: sigma, and the most in means
MOST_MEAN = 1_000_000  # tokens
COUNTS, SETTINGS = ("systems",), ("share", "turns", "think", "tools", "wait", "zipf")


def _synthetic(name: str) -> Synthetic | None:
    """Known lengths, or those of given means as in 1200/100."""
    if (given := MEANS.fullmatch(name)) is None:
        return SYNTHETIC.get(name)
    prompt, output = (int(mean) for mean in given.groups())
    if not (prompt and output):
        raise ValueError(f"workload {name!r}: prompts and outputs have at least one token")
    return Synthetic(LogNormal(prompt, SPREAD, TAIL * prompt), LogNormal(output, SPREAD, TAIL * output))


def _conversations(name: str, limit: int, scale: float) -> Talks | None:
    """Those of `conversations` or `conversations:share=0.8,turns=5`; None for another name."""
    kind, colon, words = name.partition(":")
    if kind != CONVERSATIONS:
        return None
    chosen: dict[str, float | LogNormal] = {}
    for word in words.split(",") if colon else ():
        key, _, value = (part.strip() for part in word.partition("="))
        if key not in (*SETTINGS, *COUNTS, *LENGTHS):
            every = ", ".join((*SETTINGS, *COUNTS, *LENGTHS))
            raise ValueError(f"workload {name!r}: {key!r} is none of {every}")
        if key in chosen:
            raise ValueError(f"workload {name!r}: {key} is there twice")
        chosen[key] = _setting(name, key, value)
    try:
        asked = Conversations(**chosen)  # type: ignore[arg-type]  # by name, from _setting
        return Talks(asked.scaled(scale).fitted(limit))
    except ValueError as wrong:
        raise ValueError(f"workload {name!r}: {wrong}") from None


def _setting(name: str, key: str, value: str) -> float | LogNormal:
    """A number, or lengths with that mean."""
    try:
        number = int(value) if key in COUNTS else float(value)
    except ValueError:
        what = "a whole number" if key in COUNTS else "a number"
        raise ValueError(f"workload {name!r}: {key}: expected {what}, not {value!r}") from None
    if key not in LENGTHS:
        return number
    if not 1 <= number <= MOST_MEAN:
        raise ValueError(f"workload {name!r}: {key}: expected 1 to {MOST_MEAN:,} tokens, not {value}")
    usual: LogNormal = getattr(Conversations(), key)
    return replace(usual, mean=number, most=max(usual.most, round(TAIL * number)))


def workload(
    name: str,
    limit: int,
    scale: float = 1.0,
    over_limit: str = "refuse",
    arrivals: Arrivals = Arrivals(),
    mix: Mix = Mix(),
) -> Workload:
    """A synthetic workload by name or by its mean lengths ("1200/100": prompts and outputs), conversations
    ("conversations:share=0.8,turns=5"), made of others (bench/compound.py), or a trace by path; ValueError
    says what is wrong.

    All lengths are multiplied by `scale`. `limit` is the most tokens of prompt and output together:
    synthetic lengths are cut there; rows of a trace that go beyond it are refused, skipped or cut, as
    `over_limit` says (bench/traces.py).
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, not {scale!r}")
    source = _made(name, limit, scale)
    if source is not None:
        if arrivals.own:
            raise ValueError(f"workload {name!r} has no arrival times of its own: take poisson or gamma")
        return Workload(name, source, arrivals, mix)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"workload {name!r} is no file, and none of {', '.join(KNOWN)}")
    trace = read_trace(path, limit, scale, over_limit)
    if arrivals.own and not trace.rate:
        raise ValueError(f"workload {name!r} has no arrival times of its own: take poisson or gamma")
    source = InOrder(trace) if arrivals.own or trace.blocks else Rows(trace)
    return Workload(path.stem, source, arrivals, mix, _note(trace, over_limit, arrivals))


def _made(name: str, limit: int, scale: float) -> Source | None:
    """A workload that is drawn; None where the name is none of these."""
    talks = _conversations(name, limit, scale)
    if talks is not None:
        return talks
    made_of = compound(name, lambda part: _made(part, limit, scale))
    if made_of is not None:
        return made_of
    known = _synthetic(name)
    if known is None:
        return None
    known = Synthetic(known.prompt.scaled(scale), known.output.scaled(scale))
    longest = max(2, limit - min(known.output.most, limit // 4))
    return Synthetic(known.prompt.within(longest), known.output.within(limit // 4))


def _note(trace: Trace, over_limit: str, arrivals: Arrivals) -> str:
    """What whoever reads the figures must know."""
    said = [trace.note(over_limit)]
    if trace.rate and not arrivals.own:
        said.append(
            f"{trace.name} has arrival times that are not used: {arrivals.words} can promise a rate that its "
            "own bursts do not allow (--arrivals trace)"
        )
    return "; ".join(filter(None, said))
