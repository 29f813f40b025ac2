"""What is in one step of an engine, the port that says how long such a step takes, and a model of it.

The model is a roofline in six non-negative coefficients and one knee:

    seconds = launch + mixed [prefill > 0] + token max(knee, prefill + decodes) + attention pairs
            + decode decodes + kv kv_tokens

- The linear layers read every weight once a step and compute once a token: below `knee` tokens the reading
  is the longer of the two and a token costs nothing, above it they are bound by computing. This is why
  chunked prefill slows decodes down, and why a few prompt tokens beside decodes can be free.
- Attention of a prompt grows with the (token, attended token) pairs; of decodes with the KV they read.
- `launch` is what a step costs before any work, `mixed` what a step pays once for having prompt tokens in
  it (no captured graph, a second kernel), `decode` what every sequence costs (sampling, bookkeeping).

A straight line without the knee overestimates small chunks beside decodes by up to the weights' reading time,
which is where D-heavy instances work. It is not a simulator of kernels: seven numbers, fitted (fit.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Batch:
    """The work of one step, in the terms its time depends on.

    `attention` is the number of (prompt token, attended token) pairs of the step's prefill chunks: a chunk
    of c tokens after k computed ones adds c * k + c * (c + 1) / 2. `kv_tokens` is the context of all decodes.
    """

    prefill_tokens: int = 0
    attention: float = 0.0
    decodes: int = 0
    kv_tokens: int = 0


class StepTime(Protocol):
    """Seconds that one step takes. The truth of a simulation is one, a predictor's belief is another."""

    def seconds(self, batch: Batch) -> float:
        """Seconds from the end of the step before to the end of this one, on a busy engine."""
        ...


@dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds of a step from what is in it (the form is at the top of this file).

    `launch` and `mixed` are seconds, `knee` is tokens, the others are seconds for each of their unit.
    """

    launch: float
    mixed: float = 0.0
    token: float = 0.0
    attention: float = 0.0
    decode: float = 0.0
    kv: float = 0.0
    knee: float = 0.0

    def seconds(self, batch: Batch) -> float:
        """Seconds of a step with this work in it."""
        return self.of(batch.prefill_tokens, batch.attention, batch.decodes, batch.kv_tokens)

    def of(self, prefill_tokens: float, attention: float, decodes: float, kv_tokens: float) -> float:
        """The same from plain numbers: a prediction asks for many steps, averages are not whole."""
        seconds = self.launch + self.token * max(self.knee, prefill_tokens + decodes)
        if prefill_tokens:
            seconds += self.mixed + self.attention * attention
        return seconds + self.decode * decodes + self.kv * kv_tokens


def prompt_attention(prompt_tokens: int, cached: int = 0) -> int:
    """(token, attended token) pairs of a prompt in however many chunks it is computed, without those of the
    first `cached` tokens."""
    return (prompt_tokens * (prompt_tokens + 1) - cached * (cached + 1)) // 2
