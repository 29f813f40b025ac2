"""Predictions from a profile, corrected by what the instances are seen to do.

Every instance has two biases, observed over predicted seconds of its recent steps: of those with prompt
tokens in them, and of those without. They are bounded, so one stall cannot make an instance look dead; within
the bounds a profile of another machine heals in a few dozen steps. What was seen of an instance that has no
work any more gives way to the bias of all (predict.py says why).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from taichi_serve.instance import Instance
from taichi_serve.latency.model import Roofline, prompt_attention
from taichi_serve.latency.predict import FRESH, Average, kept, relaxed, surprised
from taichi_serve.latency.profile import Profile, Transfer
from taichi_serve.messages import Flowed, Stepped
from taichi_serve.sliders import Kind

KEEP = 0.95  # weight of the past at each sample: half is forgotten in 14
LOWEST, HIGHEST = 0.25, 4.0  # bounds of a bias
UNMEASURED = Transfer(Kind.P_HEAVY, Kind.D_HEAVY, latency=0.02, bytes_per_second=4e8)  # the slowest seen


def bounded(ratio: float) -> float:
    """A bias within its bounds."""
    return min(max(ratio, LOWEST), HIGHEST)


def credible(seconds: float, predicted: float) -> float:
    """What a step took, as a sample within the bounds of a bias: a stall of a minute would outweigh hundreds
    of good steps."""
    return min(max(seconds, LOWEST * predicted), HIGHEST * predicted)


@dataclass(slots=True)
class Seen:
    """What one instance was seen to do lately."""

    mixed: Average = field(default_factory=Average)  # seconds observed over predicted, steps with prompts
    plain: Average = field(default_factory=Average)  # the same, steps without
    share: Average = field(default_factory=Average)  # of steps that had prompt tokens
    prompt: Average = field(default_factory=Average)  # prompt tokens in such a step
    mixed_bias: float = 1.0  # the two ratios within their bounds: asked for often, changed once a step
    plain_bias: float = 1.0
    usual: float = 0.0  # the value of `prompt`
    at: float = 0.0  # when its last step ended


class Profiled:
    """A predictor that stands on a profile."""

    def __init__(
        self, model: Roofline, transfers: Mapping[tuple[Kind, Kind], Transfer], bytes_per_token: int
    ) -> None:
        """`transfers` says how fast KV moves between two kinds of instances; `bytes_per_token` is of KV."""
        self.model = model
        self.transfers = dict(transfers)
        self.bytes_per_token = bytes_per_token
        self.seen: dict[str, Seen] = {}
        self.usual = Average()  # seconds observed over predicted, of all steps of all instances
        self.now = 0.0  # when the last step of any instance ended
        self.gaps: dict[tuple[Kind, Kind], Average] = {}
        # The link and how much slower it was of late, by whether either end is P-heavy: asked for every
        # instance at every arrival, and changed once a move.
        self._copying: dict[tuple[bool, bool], tuple[Transfer, float]] = {}

    @classmethod
    def of(cls, profile: Profile) -> Profiled:
        """The predictor for a measured model and device."""
        transfers = {(t.source, t.target): t for t in profile.transfers}
        return cls(profile.fit.model(), transfers, profile.bytes_per_token)

    def ttft(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        """Half of the running step, the queue's other chunks and the own ones, beside the decodes there (s).

        Chunks are filled across prompts, so only the sum of tokens counts; attention is that of each prompt.
        """
        # Roofline.of is written out here, and so are its maxima: this runs for every instance at every
        # arrival.
        model, chunk, running = self.model, instance.chunk or 1, instance.running_tokens
        ahead = instance.queued_tokens - instance.progress_tokens
        decodes, token, floor = instance.decodes, model.token, model.token * model.knee
        context = instance.context_base + decodes * instance.ticks
        plain = model.launch + model.decode * decodes + model.kv * context
        beside = plain + model.mixed
        full, rest = divmod(ahead - running + prompt_tokens - cached, chunk)
        work = token * (chunk + decodes)
        seconds = full * (beside + (work if work > floor else floor))
        seen = self.seen.get(instance.name)
        if rest:
            if running and seen and rest < seen.usual:
                # Until that step begins others arrive and share it: it will be as full as steps were lately.
                rest = min(chunk, int(seen.usual))
            work = token * (rest + decodes)
            seconds += beside + (work if work > floor else floor)
        pairs = (prompt_tokens * (prompt_tokens + 1) - cached * (cached + 1)) / 2
        if ahead:
            pairs += instance.queued_attention * (ahead - running / 2) / instance.queued_tokens
        if running or decodes:
            # A request arrives when on average half of a step is left, and cannot join it.
            work = token * (running + decodes)
            seconds += ((beside if running else plain) + (work if work > floor else floor)) / 2
        seconds += model.attention * pairs
        if seen is None:
            return seconds
        idle = self.now - seen.at
        return seconds * (seen.mixed_bias if idle <= FRESH else self._relaxed(seen.mixed_bias, idle))

    def work(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        """Its share of full chunks, beside the decodes there, and its attention (s)."""
        # Written out as in `ttft`, for the same reason.
        model, chunk, decodes = self.model, instance.chunk or 1, instance.decodes
        step = model.launch + model.mixed + model.token * max(model.knee, chunk + decodes)
        step += model.decode * decodes + model.kv * (instance.context_base + decodes * instance.ticks)
        seconds = (prompt_tokens - cached) / chunk * step
        seconds += model.attention * (prompt_tokens * (prompt_tokens + 1) - cached * (cached + 1)) / 2
        seen = self.seen.get(instance.name)
        if seen is None:
            return seconds
        idle = self.now - seen.at
        return seconds * (seen.mixed_bias if idle <= FRESH else self._relaxed(seen.mixed_bias, idle))

    def since(self, instance: Instance, elapsed: float) -> float:
        """What is left of the step that runs, beside the half of it that a prediction counts (s)."""
        running, decodes = instance.running_tokens, instance.decodes
        if not (running or decodes):
            return 0.0
        # Written out as in `ttft`, for the same reason.
        model, context = self.model, instance.context_base + decodes * instance.ticks
        step = model.launch + model.decode * decodes + model.kv * context
        step += model.token * max(model.knee, running + decodes)
        if running:
            step += model.mixed + model.attention * running * self._pairs(instance)
        seen = self.seen.get(instance.name)
        if seen is not None:
            step *= seen.mixed_bias if running else seen.plain_bias
        return max(0.0, step - elapsed) - step / 2

    def tpot(self, instance: Instance, kv_tokens: int) -> float:
        """Mean step (s): as many of them with prompt tokens, and as large, as were seen lately."""
        # Written out as in `ttft`, for the same reason.
        model, decodes = self.model, instance.decodes
        context = instance.context_base + decodes * instance.ticks + kv_tokens
        if kv_tokens:
            decodes += 1
        work = model.token * (decodes if decodes > model.knee else model.knee)
        seconds = model.launch + work + model.decode * decodes + model.kv * context
        seen = self.seen.get(instance.name)
        if seen is None:
            return seconds
        idle = self.now - seen.at
        if idle <= FRESH:
            seconds *= seen.plain_bias
            share = seen.share.value(0.0)
        else:
            seconds *= self._relaxed(seen.plain_bias, idle)
            share = seen.share.value(0.0) * kept(idle)
        if share == 0.0:
            return seconds
        prompt = seen.usual
        mixed = model.of(prompt, prompt * self._pairs(instance), decodes, context)
        return (1 - share) * seconds + share * mixed * self._relaxed(seen.mixed_bias, idle)

    def _relaxed(self, bias: float, idle: float) -> float:
        return bias if idle <= FRESH else relaxed(bias, bounded(self.usual.value(1.0)), idle)

    def move(self, source: Instance, target: Instance, kv_tokens: int, held: int = 0) -> float:
        """The gap (s): what is missing there over the link, or computed again where that is faster, and one
        step there."""
        if source is target:
            return 0.0
        missing = kv_tokens - held
        seconds = self.fetch(source, target, missing)
        if target.chunk:
            steps = -(-missing // target.chunk)
            again = steps * self.model.of(target.chunk, 0.0, target.decodes, target.context_tokens)
            seconds = min(seconds, again + self.model.attention * prompt_attention(kv_tokens, held))
        return seconds + self.tpot(target, kv_tokens)

    def fetch(self, source: Instance, target: Instance, kv_tokens: int) -> float:
        """KV over the link (s), as the moves of late took."""
        link, bias = self.link(source.kind, target.kind)
        return link.seconds(kv_tokens * self.bytes_per_token) * bias

    def link(self, source: Kind, target: Kind) -> tuple[Transfer, float]:
        """The link between instances of two kinds, and how much slower it was of late."""
        ends = source is Kind.P_HEAVY, target is Kind.P_HEAVY
        known = self._copying.get(ends)
        if known is None:
            pair = source, target
            known = self._copying[ends] = self.transfers.get(pair, UNMEASURED), self._gap_bias(pair)
        return known

    def stepped(self, instance: Instance, step: Stepped) -> None:
        """Compare a step with its prediction; `instance` is as it was before the step."""
        seen = self.seen.setdefault(instance.name, Seen())
        pairs = step.prefill_tokens * self._pairs(instance)
        predicted = self.model.of(step.prefill_tokens, pairs, step.decodes, instance.context_tokens)
        observed = credible(step.seconds, predicted)
        self.now = seen.at = max(self.now, step.at)
        ratio, began = observed / predicted if predicted else 1.0, step.at - step.seconds
        self.usual.add(observed, predicted, KEEP)
        if step.prefill_tokens:
            keep = surprised(ratio / seen.mixed_bias, seen.mixed.below, predicted, KEEP)
            seen.mixed.learn(observed, predicted, keep, began, self.now)
            seen.mixed_bias = bounded(seen.mixed.value(1.0))
            seen.prompt.add(step.prefill_tokens, 1.0, KEEP)
            seen.usual = seen.prompt.value(0.0)
        else:
            keep = surprised(ratio / seen.plain_bias, seen.plain.below, predicted, KEEP)
            seen.plain.learn(observed, predicted, keep, began, self.now)
            seen.plain_bias = bounded(seen.plain.value(1.0))
        if step.decodes:
            seen.share.add(1.0 if step.prefill_tokens else 0.0, 1.0, KEEP)

    def flowed(self, source: Instance, target: Instance, move: Flowed) -> None:
        """Compare the gap of a move that took its KV along with its prediction."""
        if source is target or move.kv_tokens == 0:
            return
        pair = source.kind, target.kind
        link = self.transfers.get(pair, UNMEASURED)
        on_the_way = max(0.0, move.gap - self.tpot(target, 0))
        predicted = link.seconds(move.kv_tokens * self.bytes_per_token)
        self.gaps.setdefault(pair, Average()).add(on_the_way, predicted, KEEP)
        self._copying.clear()

    def _gap_bias(self, pair: tuple[Kind, Kind]) -> float:
        gaps = self.gaps.get(pair)
        return bounded(gaps.value(1.0)) if gaps else 1.0

    def _pairs(self, instance: Instance) -> float:
        """Attended tokens per prompt token, on average over the queue of an instance."""
        return instance.queued_attention / instance.queued_tokens if instance.queued_tokens else 0.0
