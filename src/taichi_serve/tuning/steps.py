"""What steps of D-heavy instances did between two looks of the tuner."""

from __future__ import annotations

from dataclasses import dataclass, field

from taichi_serve.latency.predict import Average
from taichi_serve.messages import Stepped


@dataclass(frozen=True, slots=True)
class Done:
    """`pace` is the share of the strictest TPOT SLO that a decode's step took in the mean, `prompts` how many
    prompt tokens it had."""

    pace: float = 0.0
    prompts: float = 0.0


@dataclass(slots=True)
class Steps:
    """Steps with decodes, of all D-heavy instances; each counts as often as it has decodes."""

    _seconds: Average = field(default_factory=Average)
    _prompts: Average = field(default_factory=Average)

    def add(self, step: Stepped) -> None:
        """One of them."""
        self._seconds.add(step.seconds * step.decodes, step.decodes, 1.0)
        self._prompts.add(step.prefill_tokens * step.decodes, step.decodes, 1.0)

    def done(self, tpot: float) -> Done:
        """What was done since this was asked last, beside a TPOT SLO (seconds)."""
        found = Done(self._seconds.value(0.0) / tpot, self._prompts.value(0.0))
        self._seconds, self._prompts = Average(), Average()
        return found
