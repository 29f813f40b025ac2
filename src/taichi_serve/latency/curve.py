"""A StepTime of four parts: a curve over the tokens of a step, and three straight lines.

    seconds = curve(prefill tokens + decodes)            weights, products, norms, all-reduce, launch
            + per_attention * (prompt token, attended token) pairs
            + per_kv_token  * context of all decodes     their attention reads it from memory
            + per_decode    * decodes                    sampling and the output layer

The curve is piecewise linear through `knots`: below the knee a step waits for the weights to be read whatever
it computes, beyond it every token costs the same, and between the two the tiles of the products make steps
that one knee would miss by 15 %. Beyond the last knot its last slope goes on. It is not a table of
measurements: its few numbers are fitted (scripts/compose_profiles.py) or computed (latency/roofline.py).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise

from taichi_serve.latency.model import Batch


class StepCurve:
    """Seconds of a step from its tokens, attention, decodes and KV tokens."""

    def __init__(
        self,
        knots: tuple[tuple[float, float], ...],
        per_attention: float,
        per_kv_token: float,
        per_decode: float,
    ) -> None:
        """`knots` are (tokens, seconds) with rising tokens; the rest are seconds and must not be negative."""
        if len(knots) < 2 or any(a[0] >= b[0] for a, b in pairwise(knots)):
            raise ValueError("knots must be at least two pairs (tokens, seconds) with rising tokens")
        numbers = [x for knot in knots for x in knot] + [per_attention, per_kv_token, per_decode]
        if any(not math.isfinite(x) or x < 0 for x in numbers):
            raise ValueError("every coefficient of a step time must be a finite number of at least 0")
        self.knots = knots
        self.per_attention = per_attention
        self.per_kv_token = per_kv_token
        self.per_decode = per_decode
        self._ends = [tokens for tokens, _ in knots[1:-1]]
        self._slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(knots)]
        self._bases = [a[1] - slope * a[0] for a, slope in zip(knots, self._slopes, strict=False)]

    def __reduce__(self) -> tuple[type[StepCurve], tuple[object, ...]]:
        """How worker processes get it, compiled or not."""
        return StepCurve, (self.knots, self.per_attention, self.per_kv_token, self.per_decode)

    def of(self, prefill_tokens: float, attention: float, decodes: float, kv_tokens: float) -> float:
        """Seconds of a step with this work; what `seconds` is without a Batch being made."""
        tokens = prefill_tokens + decodes
        part = bisect_right(self._ends, tokens)
        return (
            self._bases[part]
            + self._slopes[part] * tokens
            + self.per_attention * attention
            + self.per_kv_token * kv_tokens
            + self.per_decode * decodes
        )

    def seconds(self, batch: Batch) -> float:
        """Seconds from the end of the step before to the end of this one, on a busy engine."""
        return self.of(batch.prefill_tokens, batch.attention, batch.decodes, batch.kv_tokens)

    def scaled(self, by: float) -> StepCurve:
        """The same, every second multiplied: a truth that is slower or faster than believed."""
        return StepCurve(
            tuple((tokens, seconds * by) for tokens, seconds in self.knots),
            self.per_attention * by,
            self.per_kv_token * by,
            self.per_decode * by,
        )
