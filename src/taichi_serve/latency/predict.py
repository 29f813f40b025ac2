"""TTFT and TPOT of a request on an instance, and the gap of a move: what the policies ask.

A prediction is a belief: the truth is in the cluster. Nothing here reads a clock; it learns from facts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from taichi_serve.instance import Instance
from taichi_serve.messages import Flowed, Stepped


class Predictor(Protocol):
    """What the policies ask. All answers are in seconds and must cost microseconds."""

    def ttft(self, instance: Instance, prompt_tokens: int) -> float:
        """From now until the first token of a prompt that is queued on this instance now."""
        ...

    def tpot(self, instance: Instance, kv_tokens: int) -> float:
        """Per output token of a resident once a decode with this context has joined; 0: as it is now."""
        ...

    def move(self, source: Instance, target: Instance, kv_tokens: int) -> float:
        """Between the last token on `source` and the first on `target`, for a context of `kv_tokens`."""
        ...

    def stepped(self, instance: Instance, step: Stepped) -> None:
        """Learn from a step; `instance` is as it was before the step."""
        ...

    def flowed(self, source: Instance, target: Instance, move: Flowed) -> None:
        """Learn from a move that is done; moves from a lost instance are not shown to it."""
        ...


@dataclass(slots=True)
class Average:
    """A decaying ratio of two sums: the first sample counts fully, old ones fade."""

    above: float = 0.0
    below: float = 0.0

    def add(self, above: float, below: float, keep: float) -> None:
        """Take a sample; `keep` is the weight that the past retains."""
        self.above = self.above * keep + above
        self.below = self.below * keep + below

    def value(self, default: float) -> float:
        """The ratio, or the default while there is no sample."""
        return self.above / self.below if self.below > 0 else default


STALL = 4.0  # a sample counts for at most so many times what was known


def bounded(sample: float, known: Average) -> float:
    """One stall of seconds must not outweigh a hundred good samples: an instance that then looks bad is
    asked no more, and nothing would ever correct it."""
    return min(sample, STALL * known.value(sample))


@dataclass(slots=True)
class Learned:
    """A predictor without a profile: it starts from a safe default and learns from every step.

    A step costs a fixed time, learned from the instance's steps without prompt tokens, and a time for each
    prompt token, learned from all instances together: they run the same model on the same kind of device.
    Were that time learned for each of them, or without the fixed part, an instance that gets few or short
    prompts would look slow for long ones, they would keep away from just the instance that is kept free
    for them, and the error would never heal. TPOT is the recent time per step with decodes in it.
    """

    seconds_per_prompt_token: float = 0.0005
    seconds_per_step: float = 0.02
    move_seconds: float = 0.05
    keep: float = 0.95  # a step's weight halves every 14 steps
    fixed: dict[str, Average] = field(default_factory=dict)
    prefill: Average = field(default_factory=Average)
    steps: dict[str, Average] = field(default_factory=dict)
    gaps: Average = field(default_factory=Average)

    def ttft(self, instance: Instance, prompt_tokens: int) -> float:
        """The steps that the queue and the own prompt fill, and the time of their tokens (seconds)."""
        tokens = instance.queued_prefill_tokens + prompt_tokens
        steps = -(-tokens // max(1, instance.chunk))
        return steps * self._fixed(instance) + tokens * self.prefill.value(self.seconds_per_prompt_token)

    def _fixed(self, instance: Instance) -> float:
        known = self.fixed.get(instance.name)
        return known.value(0.0) if known else 0.0

    def tpot(self, instance: Instance, kv_tokens: int) -> float:
        """The recent time per step with decodes in it (seconds); one more decode is taken to be free."""
        known = self.steps.get(instance.name)
        return known.value(self.seconds_per_step) if known else self.seconds_per_step

    def move(self, source: Instance, target: Instance, kv_tokens: int) -> float:
        """The recent average gap of all moves (seconds); staying costs nothing."""
        return 0.0 if source is target else self.gaps.value(self.move_seconds)

    def stepped(self, instance: Instance, step: Stepped) -> None:
        """Learn the time of prompt tokens from steps that had some, and the fixed time from the others."""
        if step.prefill_tokens:
            rest = max(0.0, step.seconds - self._fixed(instance)) / step.prefill_tokens
            self.prefill.add(
                bounded(rest, self.prefill) * step.prefill_tokens, step.prefill_tokens, self.keep
            )
        else:
            fixed = self.fixed.setdefault(instance.name, Average())
            fixed.add(bounded(step.seconds, fixed), 1.0, self.keep)
        if step.decodes:
            self.steps.setdefault(instance.name, Average()).add(step.seconds, 1.0, self.keep)

    def flowed(self, source: Instance, target: Instance, move: Flowed) -> None:
        """Learn the gap of a move."""
        if source is not target:
            self.gaps.add(bounded(move.gap, self.gaps), 1.0, self.keep)
