"""When requests arrive: as a trace has it, or drawn.

What is drawn is drawn at one request/s and then divided by the rate: the same seed gives the same requests
at every rate and for every contender (common random numbers), so differences between two runs are not
differences in luck.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

OWN, POISSON, GAMMA = "trace", "poisson", "gamma"
ARRIVALS = (OWN, POISSON, GAMMA)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """`kind` is one of ARRIVALS. `cv` is the coefficient of variation of gamma gaps: 1 is Poisson, above it
    come bursts, 0 is a clock."""

    kind: str = POISSON
    cv: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ARRIVALS:
            raise ValueError(f"arrivals {self.kind!r} are none of {', '.join(ARRIVALS)}")
        if not (math.isfinite(self.cv) and self.cv >= 0):
            raise ValueError(f"the coefficient of variation must be at least 0, not {self.cv!r}")

    @classmethod
    def of(cls, kind: str | None, cv: float | None) -> Arrivals:
        """From --arrivals and --cv, None where it was not given; ValueError where they do not go together."""
        if kind is None:
            kind = POISSON if cv is None else GAMMA
        if kind == GAMMA and cv is None:
            raise ValueError("--arrivals gamma needs --cv, the coefficient of variation of the gaps")
        if kind != GAMMA and cv is not None:
            raise ValueError(f"--cv is for --arrivals gamma, not for {kind}")
        return cls(kind, 1.0 if cv is None else cv)

    @property
    def own(self) -> bool:
        """Whether they are the trace's."""
        return self.kind == OWN

    @property
    def words(self) -> str:
        """For whoever reads the figures."""
        if self.own:
            return "the trace's own arrivals"
        return "Poisson arrivals" if self.kind == POISSON else f"gamma arrivals (cv {self.cv:g})"

    def times(self, chance: random.Random) -> Iterator[float]:
        """Endless times (s) at one request/s on average, from nought on."""
        at = 0.0
        while True:
            at += self._gap(chance)
            yield at

    def _gap(self, chance: random.Random) -> float:
        """A gap with mean 1."""
        if self.own:
            raise ValueError("arrivals of a trace are not drawn")
        if self.cv == 1.0:
            return chance.expovariate(1.0)
        shape = 1.0 / self.cv**2 if self.cv else 0.0
        return chance.gammavariate(shape, 1.0 / shape) if shape else 1.0


def stream(name: str, seed: int) -> random.Random:
    """The random numbers of one thing (arrivals, lengths) under this seed."""
    return random.Random(f"{name} {seed}")
