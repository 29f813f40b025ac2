"""The values the two algorithms work with. Values, never mode flags: every mode is a choice of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from taichi_serve.classes import SLOClass

# What the scheduler does about prefix caches, in the words of command lines: it is not told of them, reckons
# with them, or has prefixes fetched, too.
BLIND, KNOWN, FETCH = "blind", "known", "fetch"
PREFIXES = (BLIND, KNOWN, FETCH)

# What becomes of a request that can no longer meet its TTFT, in the words of command lines: it is served in
# its turn like any other; it is best effort, or the longest of those before it is, which frees more for the
# others; or it is turned away at the door.
SERVE, DEMOTE, REFUSE = "serve", "demote", "refuse"
OVERLOAD = (SERVE, DEMOTE, REFUSE)


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be tuned in Algorithms 1 and 2 (paper, section 4; docs/decisions say why these defaults).

    `watermark`     share of a D-heavy instance's KV above which its longest output is degraded; from 1.0 on
                    nobody is ever degraded, and no decode is put on a P-heavy instance (disaggregation).
    `alpha`         share of the TPOT SLO at which a request on a P-heavy instance flows back.
    `ttft_margin`   share of the TTFT SLO that a prediction may use up and still count as feasible.
    `tpot_margin`   share of the TPOT SLO that decodes of a D-heavy instance may be predicted to take for
                    prompts to be preferred there.
    `hysteresis`    share of KV below the watermark that must stay free after a backflow lands.
    `max_degrades`  how often one request may be degraded; every degrading may be followed by a backflow.
    `dwell`         seconds a request stays where it is between two moves of Algorithm 1.
    `growth`        tokens that every resident is expected to grow by while one move is under way.
    `ahead`         whether the KV of a long prompt is copied to where it will decode while later chunks of
                    it are computed (for clusters that can; simulated links do not).
    `fetch`         whether a prompt's prefix may be copied from the instance that has it to one where the
                    prompt is better placed, when that is faster than computing it there (for clusters that
                    can).
    `fetch_within`  seconds after which a cluster computes a prompt whose prefix has not come: nothing is
                    fetched where it would wait longer in the queue (--move-timeout).
    `overload`      what becomes of a request that can no longer meet its TTFT.
    `patience`      how many times its TTFT SLO best effort may wait for its first token, at most.
    `leftover`      share of the instances' time that is kept for best effort, however many come: what would
                    have to wait longer than its patience for it is turned away. It is more while
                    nobody else waits.
    `classes`       classes of requests: their SLOs, weights, and whether they may be refused or demoted.
    `fair`          whether weights of classes are shares of what is computed in time under overload; else
                    the class with the lowest weight goes first.
    `scan`          how many candidates one step looks at, so that a decision costs the same in any crowd.
    """

    watermark: float = 0.95
    alpha: float = 0.96
    ttft_margin: float = 0.5
    tpot_margin: float = 0.8
    hysteresis: float = 0.05
    max_degrades: int = 2
    dwell: float = 0.25
    growth: int = 8
    ahead: bool = False
    fetch: bool = False
    fetch_within: float = 10.0
    scan: int = 8
    overload: str = SERVE
    patience: float = 5.0
    leftover: float = 0.03
    classes: tuple[SLOClass, ...] = ()
    fair: bool = False

    def __post_init__(self) -> None:
        for name in ("watermark", "alpha", "ttft_margin", "tpot_margin", "fetch_within"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        for name in ("hysteresis", "dwell", "max_degrades", "growth"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must not be negative, and is {value!r}")
        if self.hysteresis >= self.watermark:
            raise ValueError(f"hysteresis ({self.hysteresis}) must be below watermark ({self.watermark})")
        if self.overload not in OVERLOAD:
            raise ValueError(f"overload {self.overload!r} is none of {', '.join(OVERLOAD)}")
        if not (math.isfinite(self.patience) and self.patience >= 2.0 and 0.0 <= self.leftover <= 1.0):
            raise ValueError("patience must be at least 2 times the TTFT SLO, and leftover a share")
        if self.scan < 1:
            raise ValueError(f"scan must be at least 1, not {self.scan!r}")

    @property
    def degrades(self) -> bool:
        """Whether a decode may be put on a P-heavy instance to relieve a D-heavy one."""
        return self.watermark < 1.0

    @property
    def full_mark(self) -> float:
        """Share of KV that a newcomer may fill an instance up to without anybody being degraded."""
        return min(self.watermark, 1.0)

    @property
    def return_mark(self) -> float:
        """Share of KV that a backflow may fill an instance up to."""
        return round(self.full_mark - self.hysteresis, 9)  # 0.95 - 0.05 is a little less than 0.9
