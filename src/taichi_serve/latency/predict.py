"""TTFT and TPOT of a request on an instance, and the gap of a move: what the policies ask.

A prediction is a belief: the truth is in the cluster. Nothing here reads a clock; it learns from facts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from taichi_serve.instance import Instance
from taichi_serve.messages import Flowed, Stepped


class Predictor(Protocol):
    """What the policies ask. All answers are in seconds and must cost microseconds."""

    def ttft(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        """From now until the first token of a prompt that is queued on this instance now, where its first
        `cached` tokens need not be computed."""
        ...

    def work(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        """What such a prompt adds to the queue of this instance: to the TTFT of whoever comes after it."""
        ...

    def since(self, instance: Instance, elapsed: float) -> float:
        """By how much a TTFT there is longer than predicted, where it is known that the step that runs began
        `elapsed` seconds ago."""
        ...

    def tpot(self, instance: Instance, kv_tokens: int) -> float:
        """Per output token of a resident once a decode with this context has joined; 0: as it is now."""
        ...

    def move(self, source: Instance, target: Instance, kv_tokens: int, held: int = 0) -> float:
        """Between the last token on `source` and the first on `target`, for a context of `kv_tokens` of which
        the target has the first `held` already."""
        ...

    def fetch(self, source: Instance, target: Instance, kv_tokens: int) -> float:
        """What copying `kv_tokens` of a prefix cache takes."""
        ...

    def stepped(self, instance: Instance, step: Stepped) -> None:
        """Learn from a step; `instance` is as it was before the step."""
        ...

    def flowed(self, source: Instance, target: Instance, move: Flowed) -> None:
        """Learn from a move that is done; moves from a lost instance are not shown to it."""
        ...


@dataclass(slots=True)
class Average:
    """A decaying ratio of two sums: the first sample counts fully, old ones fade. `at` is when the last one
    came, for whoever gives it times (seconds)."""

    above: float = 0.0
    below: float = 0.0
    at: float = 0.0

    def add(self, above: float, below: float, keep: float) -> None:
        """Take a sample; `keep` is the weight that the past retains."""
        self.above = self.above * keep + above
        self.below = self.below * keep + below

    def learn(self, above: float, below: float, keep: float, began: float, now: float) -> None:
        """The same of something that took from `began` until `now`: what was seen long before counts less."""
        self.add(above, below, keep * kept(began - self.at))
        self.at = now

    def value(self, default: float) -> float:
        """The ratio, or the default while there is no sample."""
        return self.above / self.below if self.below > 0 else default


STALL = 4.0  # a sample counts for at most so many times what was known
NOISE = 1.5  # up to so many times what was expected is no surprise
REMAIN = 4.0  # samples that a surprise leaves of the past
FRESH = 1.0  # seconds for which what was seen of an instance is taken as it is
HALF = 2.0  # seconds after those in which half of it is forgotten


def bounded(sample: float, known: Average) -> float:
    """One stall of seconds must not outweigh a hundred good samples: an instance that then looks bad is
    asked no more, and nothing would ever correct it."""
    return min(sample, STALL * known.value(sample))


def surprised(ratio: float, weight: float, sample: float, keep: float) -> float:
    """What the past, of this `weight`, retains when a `sample` took `ratio` times what was expected.

    The longer it took, the less the past says: an instance that becomes three times as slow is known for that
    within a second. But a few samples of it always remain, or one outlier would be all that is known.
    """
    if ratio <= NOISE:
        return keep
    return max(math.pow(keep, ratio * ratio), min(keep, REMAIN * sample / weight if weight > 0.0 else keep))


def kept(idle: float) -> float:
    """The weight, 0 to 1, of what was seen so many seconds ago."""
    return 1.0 if idle <= FRESH else 0.5 ** ((idle - FRESH) / HALF)


def relaxed(value: float, usual: float, idle: float) -> float:
    """What is believed of an instance that was seen `idle` seconds ago: what was seen of it, and more and
    more of what is `usual` among all, where that is better.

    An instance that looks bad gets no work, and without work nobody sees what it can do by now: somebody has
    to be sent there to look. One that looks good needs no such doubt.
    """
    return value if value <= usual or idle <= FRESH else usual + (value - usual) * kept(idle)


@dataclass(slots=True)
class Learned:
    """A predictor without a profile: it starts from a safe default and learns from every step.

    A step costs a fixed time, learned from the instance's steps without prompt tokens, and a time for each
    prompt token, learned from all instances together: they run the same model on the same kind of device.
    Were that time learned for each of them, or without the fixed part, an instance that gets few or short
    prompts would look slow for long ones, they would keep away from just the instance that is kept free
    for them, and the error would never heal. TPOT is the recent time per step with decodes in it.

    No single step counts for more than a few times what such a step was known to take, and what was seen of
    an instance that has no work any more gives way to what its steps without prompts usually take elsewhere.
    """

    seconds_per_prompt_token: float = 0.0005
    seconds_per_step: float = 0.02
    move_seconds: float = 0.05
    keep: float = 0.95  # a step's weight halves every 14 steps
    fixed: dict[str, Average] = field(default_factory=dict)
    prefill: Average = field(default_factory=Average)
    steps: dict[str, Average] = field(default_factory=dict)
    gaps: Average = field(default_factory=Average)
    moved: Average = field(default_factory=Average)  # KV tokens of a move
    usual: Average = field(default_factory=Average)  # seconds of a step without prompts, of all instances
    now: float = 0.0  # when the last step of any instance ended

    def ttft(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        """The steps that the queue and the own prompt fill, and the time of their tokens (seconds)."""
        tokens = instance.queued_prefill_tokens + prompt_tokens - cached
        steps = -(-tokens // max(1, instance.chunk))
        return steps * self._fixed(instance) + tokens * self.prefill.value(self.seconds_per_prompt_token)

    def work(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        """The time of its tokens, and their share of the steps that they fill (seconds)."""
        tokens = prompt_tokens - cached
        share = self._fixed(instance) / max(1, instance.chunk)
        return tokens * (share + self.prefill.value(self.seconds_per_prompt_token))

    def since(self, instance: Instance, elapsed: float) -> float:
        """What is over of the step that runs, all of whose tokens count as queued (seconds)."""
        running = instance.running_tokens
        step = self._fixed(instance) + running * self.prefill.value(self.seconds_per_prompt_token)
        return -min(elapsed, step) if running else 0.0

    def _fixed(self, instance: Instance) -> float:
        return self._relaxed(self.fixed.get(instance.name), 0.0)

    def _relaxed(self, known: Average | None, default: float) -> float:
        if known is None or not known.below:
            return default
        value = known.value(default)
        return relaxed(value, self.usual.value(value), self.now - known.at)

    def tpot(self, instance: Instance, kv_tokens: int) -> float:
        """The recent time per step with decodes in it (seconds); one more decode is taken to be free."""
        return self._relaxed(self.steps.get(instance.name), self.seconds_per_step)

    def move(self, source: Instance, target: Instance, kv_tokens: int, held: int = 0) -> float:
        """The recent average gap of all moves (seconds); staying costs nothing."""
        return 0.0 if source is target else self.gaps.value(self.move_seconds)

    def fetch(self, source: Instance, target: Instance, kv_tokens: int) -> float:
        """The gap of a move (seconds), and as many times that as it would be the KV of a move."""
        return self.gaps.value(self.move_seconds) * max(1.0, kv_tokens / self.moved.value(math.inf))

    def stepped(self, instance: Instance, step: Stepped) -> None:
        """Learn the time of prompt tokens from steps that had some, and the fixed time from the others."""
        self.now = max(self.now, step.at)
        if step.decodes:
            # A step with many prompt tokens among many without is long by right.
            likely = self._fixed(instance) + step.prefill_tokens * self.prefill.value(0.0)
            self._see(self.steps.setdefault(instance.name, Average()), step, likely)
        if step.prefill_tokens:
            rest = max(0.0, step.seconds - self._fixed(instance)) / step.prefill_tokens
            self.prefill.add(
                bounded(rest, self.prefill) * step.prefill_tokens, step.prefill_tokens, self.keep
            )
        else:
            self._see(self.fixed.setdefault(instance.name, Average()), step)
            self.usual.add(bounded(step.seconds, self.usual), 1.0, self.keep)

    def _see(self, known: Average, step: Stepped, likely: float = 0.0) -> None:
        expected = max(likely, known.value(step.seconds))
        seconds = min(step.seconds, STALL * expected)
        keep = surprised(seconds / expected if expected else 1.0, known.below, 1.0, self.keep)
        known.learn(seconds, 1.0, keep, step.at - step.seconds, self.now)

    def flowed(self, source: Instance, target: Instance, move: Flowed) -> None:
        """Learn the gap of a move."""
        if source is not target:
            self.gaps.add(bounded(move.gap, self.gaps), 1.0, self.keep)
            if move.kv_tokens:
                self.moved.add(move.kv_tokens, 1.0, self.keep)
