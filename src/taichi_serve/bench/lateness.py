"""How well the load generator kept its schedule: a late one measures itself, and no server."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

# Seconds. TTFT counts from when a request was due, and who sends late reads late, too. An SLO for the first
# token is rarely below a second, of which this is a twentieth.
BOUND = 0.05


@dataclass(frozen=True, slots=True)
class Lateness:
    """Of counted requests, and of all who sent them."""

    p99: float  # seconds behind its schedule that 99 of 100 requests were sent within
    busy: tuple[float, ...]  # share of a core that each sender used meanwhile

    @classmethod
    def of(cls, late: Iterable[float], busy: tuple[float, ...]) -> Lateness | None:
        """From the seconds of each request; None where none was sent."""
        each = sorted(late)
        return cls(each[math.ceil(0.99 * len(each)) - 1], busy) if each else None

    @classmethod
    def worst(cls, parts: Sequence[Lateness | None]) -> Lateness | None:
        """Of several runs: the latest, and each sender when it was busiest. None where one does not know."""
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return cls(max(part.p99 for part in known), busiest(part.busy for part in known))

    @property
    def words(self) -> str:
        """For a terminal."""
        low, high = (f"{of(self.busy, default=0.0):.0%}" for of in (min, max))
        share = f"at {high}" if low == high else f"at {low} to {high}"
        count = f"{len(self.busy)} sender{'' if len(self.busy) == 1 else 's'}"
        return f"{count} {share} of a core, {self.p99 * 1e3:.3g} ms late (p99)"

    @property
    def remark(self) -> str | None:
        """What makes the figures doubtful."""
        if self.p99 <= BOUND:
            return None
        return f"the load generator was {self.p99:.2g} s late (p99)"


def busiest(runs: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    """Each sender's highest share in all of them."""
    return tuple(max(shares) for shares in zip_longest(*runs, fillvalue=0.0))


class Core:
    """The share of a core that this process uses from now on."""

    def __init__(self) -> None:
        self._at, self._used = time.perf_counter(), time.process_time()

    def share(self) -> float:
        """Processor seconds a second so far."""
        return (time.process_time() - self._used) / max(1e-9, time.perf_counter() - self._at)
