"""Lengths of prompts and outputs: drawn one by one, or the rows of a trace in their order."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log
from typing import Protocol

from taichi_serve.bench.arrivals import Arrivals, stream
from taichi_serve.bench.blocks import anew
from taichi_serve.bench.trace import Trace
from taichi_serve.cluster.simulated.job import Call

BLOCK = 16  # tokens of a block where the source of the lengths does not say: as engines have it


class Source(Protocol):
    """What is asked, and with `arrivals` also when."""

    def calls(self, arrivals: Arrivals, rate: float, requests: int, seed: int) -> Iterator[Call]:
        """Calls in order of time; with all turns that follow these there are `requests` of them."""
        ...

    @property
    def block_size(self) -> int:
        """How many tokens a hash of Call.blocks covers."""
        ...


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A log-normal length: `mean` in tokens, `sigma` of its logarithm, never above `most`."""

    mean: float
    sigma: float
    most: int

    def draw(self, chance: random.Random) -> int:
        """One length; where `most` cuts, the mean is a little below `mean`."""
        mu = log(self.mean) - self.sigma**2 / 2
        return max(1, min(self.most, round(chance.lognormvariate(mu, self.sigma))))

    def scaled(self, factor: float) -> LogNormal:
        """The same shape, so many times as long."""
        return replace(self, mean=self.mean * factor, most=max(1, round(self.most * factor)))

    def within(self, most: int) -> LogNormal:
        """The same, never above `most` either."""
        return replace(self, most=max(1, min(self.most, most)))


class Independent(ABC):
    """Requests that share nothing, with lengths that are drawn."""

    __slots__ = ()

    @abstractmethod
    def draw(self, chance: random.Random) -> Iterator[tuple[int, int]]:
        """Endless pairs (prompt, output) in tokens."""

    def calls(self, arrivals: Arrivals, rate: float, requests: int, seed: int) -> Iterator[Call]:
        """The same at every rate."""
        times = arrivals.times(stream("arrivals", seed))
        lengths = self.draw(stream("lengths", seed))
        for _, at, (prompt, output) in zip(range(requests), times, lengths, strict=False):
            yield Call(at / rate, prompt, output)

    @property
    def block_size(self) -> int:
        """There are no blocks to be had."""
        return BLOCK


@dataclass(frozen=True, slots=True)
class Synthetic(Independent):
    """Independent log-normal prompts and outputs."""

    prompt: LogNormal
    output: LogNormal

    def draw(self, chance: random.Random) -> Iterator[tuple[int, int]]:
        """Endless pairs."""
        while True:
            yield self.prompt.draw(chance), self.output.draw(chance)


@dataclass(frozen=True, slots=True)
class Rows(Independent):
    """Lengths drawn from the rows of a trace, with replacement: prompt and output of a row stay together."""

    trace: Trace

    def draw(self, chance: random.Random) -> Iterator[tuple[int, int]]:
        """Endless pairs."""
        prompts, outputs = self.trace.prompts, self.trace.outputs
        while True:
            row = chance.randrange(len(prompts))
            yield prompts[row], outputs[row]


@dataclass(frozen=True, slots=True)
class InOrder:
    """The rows of a trace in their order: its times, and what a prompt has from those before it, mean
    something only there. Seed 0 begins with the first row, every other seed where it happens to; after the
    last row comes the first. A row that comes again has blocks of its own, or all of it would be cached."""

    trace: Trace

    @property
    def block_size(self) -> int:
        """As the trace has it."""
        return self.trace.block_size or BLOCK

    def calls(self, arrivals: Arrivals, rate: float, requests: int, seed: int) -> Iterator[Call]:
        """With the trace's own arrivals, `rate` over the rate of the whole trace is how much faster it is
        played."""
        trace, rows = self.trace, len(self.trace)
        first = stream("first row", seed).randrange(rows) if seed else 0
        times = self._own(first) if arrivals.own else arrivals.times(stream("arrivals", seed))
        for number, at in zip(range(requests), times, strict=False):
            row = (first + number) % rows
            blocks = anew(trace.blocks[row], number // rows) if trace.blocks else ()
            yield Call(at / rate, trace.prompts[row], trace.outputs[row], blocks=blocks)

    def _own(self, first: int) -> Iterator[float]:
        """The trace's times from this row on, at one request/s on average over the whole trace."""
        times, rate = self.trace.times, self.trace.rate
        lap = times[-1] - times[0] + 1.0 / rate
        number = first
        while True:
            laps, row = divmod(number, len(times))
            yield (laps * lap + times[row] - times[first]) * rate
            number += 1
