"""Two servers measured in pairs: which comes first, what the ratios say, and whether others worked."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import psutil

from taichi_serve.commands.family import cpu_seconds

Kind = Literal["ours", "stock"]


def order(pair: int) -> tuple[Kind, Kind]:
    """Which one goes first alternates, so that a machine that gets faster or slower favours neither."""
    return ("ours", "stock") if pair % 2 else ("stock", "ours")


@dataclass(frozen=True)
class Figure:
    """One figure of both servers, and the bound of ours over theirs where there is one."""

    name: str
    key: str  # of the result of `vllm bench serve`
    at_least: float = 0.0
    at_most: float = float("inf")

    def verdict(self, ratio: float, within: tuple[float, float] | None = None) -> str:
        """What a median ratio says about the bound; open where the bound lies within the interval."""
        if self.at_least == 0.0 and self.at_most == float("inf"):
            return ""
        bound = f">= {self.at_least:g}" if self.at_least else f"<= {self.at_most:g}"
        low, high = within or (ratio, ratio)
        if any(low < limit < high for limit in (self.at_least, self.at_most)):
            return f"open {bound}"
        return f"{'within' if self.at_least <= ratio <= self.at_most else 'MISSES'} {bound}"


@dataclass
class Ratios:
    """Ours over theirs, one ratio of each figure for every pair."""

    figures: Sequence[Figure]
    of: dict[str, list[float]] = field(default_factory=dict)

    def add(self, ours: Mapping[str, float], stock: Mapping[str, float]) -> None:
        """One pair more."""
        for figure in self.figures:
            self.of.setdefault(figure.name, []).append(ours[figure.key] / stock[figure.key])

    def rows(self) -> list[str]:
        """For each figure the median with its 95 % interval, what the bound says, and every ratio."""
        return [self._row(figure, self.of[figure.name]) for figure in self.figures]

    @staticmethod
    def _row(figure: Figure, ratios: list[float]) -> str:
        median, found = statistics.median(ratios), interval(ratios)
        within = f"({found[0]:.3f} to {found[1]:.3f})" if found else "(too few)"
        every = " ".join(f"{ratio:.3f}" for ratio in ratios)
        return f"{figure.name:20} {median:.3f} {within:16} {figure.verdict(median, found):14} of {every}"


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the median; None for fewer than six, of which it cannot be told.

    The values between which it lies are counted off from both ends: each is above the median as likely as
    below it, whatever the values are distributed like, so what is far out (a disturbed pair) moves nothing.
    """
    count, inside, place = len(values), 1.0, 0
    while True:
        tail = 2 * math.comb(count, place) / 2**count
        if inside - tail < 0.95:
            break
        inside, place = inside - tail, place + 1
    ordered = sorted(values)
    return (ordered[place - 1], ordered[-place]) if place else None


# ---------------------------------------------------------------------------- what others do on the machine


def busy() -> float:
    """CPU seconds that this machine has worked so far, and those that its host gave to others."""
    times = psutil.cpu_times()._asdict()
    # A guest's time is in user's already.
    return sum(times.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


class Watch:
    """CPU time of a server and all below it, and what neither they nor our other children took."""

    def __init__(self, pid: int, *besides: int) -> None:
        """Of this server. `besides` are children of ours that stay: their time is not that of others."""
        self._pid, self._besides = pid, besides
        self._at, self._before = time.monotonic(), self._read()

    def _read(self) -> tuple[float, float]:
        server = cpu_seconds(self._pid)
        besides = sum(map(cpu_seconds, self._besides))
        ended = os.times()  # of children of ours that have ended: the load generator
        return server, busy() - server - besides - ended.children_user - ended.children_system

    def read(self) -> dict[str, float]:
        """Since this watch began: `cpu` seconds of the server, and how many cores `others` used."""
        (server, others), (server_before, others_before) = self._read(), self._before
        seconds = time.monotonic() - self._at
        return {"cpu": server - server_before, "others": (others - others_before) / seconds}


def wait_for_quiet(cores: float, seconds: float = 1800.0, window: float = 5.0) -> None:
    """Wait until others use at most so many cores. What this process started may be there, and idle."""
    until = time.monotonic() + seconds
    while True:
        watch = Watch(os.getpid())
        time.sleep(window)
        if (others := watch.read()["others"]) <= cores:
            return
        assert time.monotonic() < until, f"others still use {others:.2f} cores"
