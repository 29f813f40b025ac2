"""Seeded workloads: when requests arrive, and how long their prompts and outputs are.

Chance lives here and nowhere else. Arrivals and lengths have a stream of random numbers each, and arrivals
are drawn at one request/s and then divided by the rate: the same seed gives the same requests at every rate
and for every contender (common random numbers), so differences between two runs are not differences in luck.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Protocol

from taichi_serve.bench.traces import Trace, read_trace
from taichi_serve.cluster.simulated.job import Call


class Lengths(Protocol):
    """Prompt and output lengths, one pair after another."""

    def draw(self, chance: random.Random) -> Iterator[tuple[int, int]]:
        """Endless pairs (prompt, output) in tokens."""
        ...


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A log-normal length: `mean` in tokens, `sigma` of its logarithm, never above `most`."""

    mean: float
    sigma: float
    most: int

    def draw(self, chance: random.Random) -> int:
        """One length; where `most` cuts, the mean is a little below `mean`."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        return max(1, min(self.most, round(chance.lognormvariate(mu, self.sigma))))

    def scaled(self, factor: float) -> LogNormal:
        """The same shape, so many times as long."""
        return replace(self, mean=self.mean * factor, most=max(1, round(self.most * factor)))


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Independent log-normal prompts and outputs."""

    prompt: LogNormal
    output: LogNormal

    def draw(self, chance: random.Random) -> Iterator[tuple[int, int]]:
        """Endless pairs."""
        while True:
            yield self.prompt.draw(chance), self.output.draw(chance)


@dataclass(frozen=True, slots=True)
class Rows:
    """Lengths drawn from the rows of a trace, with replacement: prompt and output of a row stay together."""

    trace: Trace

    def draw(self, chance: random.Random) -> Iterator[tuple[int, int]]:
        """Endless pairs."""
        prompts, outputs = self.trace.prompts, self.trace.outputs
        while True:
            row = chance.randrange(len(prompts))
            yield prompts[row], outputs[row]


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths and how irregularly they arrive: `cv` 1 is Poisson, above it bursts (gamma gaps)."""

    name: str
    lengths: Lengths
    cv: float = 1.0
    note: str = ""  # what whoever reads the figures must know of the lengths

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cv) and self.cv >= 0):
            raise ValueError(f"the coefficient of variation must be at least 0, not {self.cv!r}")

    def calls(self, rate: float, requests: int, seed: int) -> Iterator[Call]:
        """`requests` calls at `rate` requests/s."""
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"rate must be a positive number of requests/s, not {rate!r}")
        times, lengths = random.Random(f"arrivals {seed}"), random.Random(f"lengths {seed}")
        at = 0.0
        for _, (prompt, output) in zip(range(requests), self.lengths.draw(lengths), strict=False):
            at += self._gap(times)
            yield Call(at / rate, prompt, output)

    def _gap(self, chance: random.Random) -> float:
        """A gap with mean 1."""
        if self.cv == 1.0:
            return chance.expovariate(1.0)
        shape = 1.0 / self.cv**2 if self.cv else 0.0
        return chance.gammavariate(shape, 1.0 / shape) if shape else 1.0

    def means(self, draws: int = 4000, seed: int = 0) -> tuple[float, float]:
        """Mean prompt and output length (tokens) over some draws."""
        pairs = [(c.prompt_tokens, c.output_tokens) for c in self.calls(1.0, draws, seed)]
        return sum(p for p, _ in pairs) / len(pairs), sum(o for _, o in pairs) / len(pairs)


@dataclass(frozen=True, slots=True)
class Replay:
    """A trace with its own arrivals; `scale` above 1 plays it faster."""

    trace: Trace
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.trace.times:
            raise ValueError(f"trace {self.trace.name} has no arrival times: give a rate")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a positive number, not {self.scale!r}")

    def calls(self, requests: int) -> Iterator[Call]:
        """The first `requests` rows, over again from the start if there are fewer."""
        times = self.trace.times
        span = times[-1] - times[0] + (1.0 / self.trace.rate if self.trace.rate else 0.0)
        for number, row in zip(range(requests), count(), strict=False):
            turn, place = divmod(row, len(times))
            at = (turn * span + times[place] - times[0]) / self.scale
            yield Call(at, self.trace.prompts[place], self.trace.outputs[place], f"r{number}")


# Means of the paper; the spread is ours: public conversations and summaries have about this one.
SYNTHETIC = {
    "sharegpt": Synthetic(LogNormal(661, 1.0, 8192), LogNormal(257, 0.8, 2048)),
    "summarization": Synthetic(LogNormal(7317, 0.5, 28000), LogNormal(201, 0.5, 2048)),
}


MEANS = re.compile(r"(\d+)/(\d+)")
SPREAD, TAIL = 0.6, 8  # of lengths of which only the means are given: sigma, and the most in means


def _synthetic(name: str) -> Synthetic | None:
    """Known lengths, or those of given means as in 1200/100."""
    if (given := MEANS.fullmatch(name)) is None:
        return SYNTHETIC.get(name)
    prompt, output = (int(mean) for mean in given.groups())
    if not (prompt and output):
        raise ValueError(f"workload {name!r}: prompts and outputs have at least one token")
    return Synthetic(LogNormal(prompt, SPREAD, TAIL * prompt), LogNormal(output, SPREAD, TAIL * output))


def workload(
    name: str, limit: int, cv: float = 1.0, scale: float = 1.0, over_limit: str = "refuse"
) -> Workload:
    """A synthetic workload by name or by its mean lengths ("1200/100": prompts and outputs), or the lengths
    of a trace by path; ValueError says what is wrong.

    All lengths are multiplied by `scale`. `limit` is the most tokens of prompt and output together:
    synthetic lengths are cut there; rows of a trace that go beyond it are refused, skipped or cut, as
    `over_limit` says (bench/traces.py).
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, not {scale!r}")
    known = _synthetic(name)
    if known is not None:
        known = Synthetic(known.prompt.scaled(scale), known.output.scaled(scale))
        longest = max(2, limit - min(known.output.most, limit // 4))
        prompt = replace(known.prompt, most=min(known.prompt.most, longest))
        output = replace(known.output, most=min(known.output.most, limit // 4))
        return Workload(name, Synthetic(prompt, output), cv)
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"workload {name!r} is no file, and none of {', '.join(sorted(SYNTHETIC))}, 1200/100"
        )
    trace = read_trace(path, limit, scale, over_limit)
    return Workload(path.stem, Rows(trace), cv, trace.note(over_limit))
