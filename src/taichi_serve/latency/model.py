"""What is in one step of an engine, and the port that says how long such a step takes."""

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
