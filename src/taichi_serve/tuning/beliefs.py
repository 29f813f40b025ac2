"""What is believed of the instances by now, from what the predictor learned of their steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from taichi_serve.instance import Instance
from taichi_serve.latency.fit import Sample
from taichi_serve.latency.model import Batch
from taichi_serve.latency.predict import Average, Learned, Predictor
from taichi_serve.latency.profile import Transfer
from taichi_serve.latency.profiled import UNMEASURED, Profiled, bounded, credible
from taichi_serve.messages import Stepped
from taichi_serve.sliders import Kind
from taichi_serve.tuning.rehearsal import Limits, Plant

# Steps of either sort that a model without a profile is fitted to, and at least so many.
KEPT, ENOUGH = 400, 60
HALF = 40_000  # tokens from steps without prompt tokens in which half of what these took is forgotten


class Beliefs:
    """Step times as they were seen. With a profile the predictor has most of it; without one some steps are
    remembered, and the model is fitted to these."""

    def __init__(self, limits: Limits, predictor: Predictor) -> None:
        self.limits = limits
        self.predictor = predictor
        self._mixed: deque[Sample] = deque(maxlen=KEPT)
        self._plain: deque[Sample] = deque(maxlen=KEPT)
        # With a profile: seconds observed over predicted of steps without prompts, each as often as it has
        # decodes. What a rehearsal asks about is the full ones, and under another R_PD there may be none now.
        self._decoding = Average()

    def stepped(self, instance: Instance, step: Stepped) -> None:
        """See a step; `instance` is as it was before."""
        if not (step.prefill_tokens or step.decodes):
            return
        if isinstance(self.predictor, Profiled):
            if not step.prefill_tokens:
                predicted = self.predictor.model.of(0, 0.0, step.decodes, instance.context_tokens)
                observed = credible(step.seconds, predicted)
                keep = 0.5 ** (step.decodes / HALF)
                self._decoding.add(observed * step.decodes, predicted * step.decodes, keep)
            return
        queued = instance.queued_tokens
        pairs = instance.queued_attention / queued * step.prefill_tokens if queued else 0.0
        batch = Batch(step.prefill_tokens, pairs, step.decodes, instance.context_tokens)
        (self._mixed if step.prefill_tokens else self._plain).append(Sample(batch, step.seconds))

    def plant(self, kinds: Mapping[str, Kind]) -> Plant | None:
        """The instances for a rehearsal; None while too little is known. `kinds` says what each is now."""
        predictor = self.predictor
        if isinstance(predictor, Profiled):
            return self._corrected(predictor, kinds)
        if min(len(self._mixed), len(self._plain)) < ENOUGH:
            return None
        steps = (*self._mixed, *self._plain)
        return Plant(None, steps, 1.0, 1.0, 1.0, self.limits, self._links(predictor))

    def _corrected(self, predictor: Profiled, kinds: Mapping[str, Kind]) -> Plant:
        """By what steps with prompt tokens took of either kind, and all others of both: a model of few terms
        that is right for small chunks may be wrong for large ones, and R_PD is chosen by the difference."""
        mixed = {kind: Average() for kind in Kind}
        all_mixed, beside = Average(), Average()
        for name, seen in predictor.seen.items():
            if name not in kinds:  # it left
                continue
            for average in (mixed[kinds[name]], all_mixed):
                average.add(seen.mixed.above, seen.mixed.below, 1.0)
            if kinds[name] is Kind.D_HEAVY:
                beside.add(seen.share.above, seen.share.below, 1.0)
        usual = all_mixed.value(1.0)  # what is believed of a kind that computed no prompts
        p_mixed, d_mixed = (bounded(mixed[kind].value(usual)) for kind in (Kind.P_HEAVY, Kind.D_HEAVY))
        transfers = tuple(predictor.transfers.values()) or (UNMEASURED,)
        alone = crowded(bounded(self._decoding.value(1.0)), d_mixed, beside.value(0.0))
        return Plant(predictor.model, (), p_mixed, d_mixed, alone, self.limits, transfers)

    def _links(self, predictor: Predictor) -> tuple[Transfer, ...]:
        """As fast as moves were: all of a gap counts as latency."""
        gap = predictor.gaps.value(predictor.move_seconds) if isinstance(predictor, Learned) else 0.05
        return tuple(Transfer(a, b, gap, 1e12) for a in Kind for b in Kind)


def crowded(plain: float, mixed: float, share: float) -> float:
    """The factor of steps without prompt tokens on D-heavy instances where this `share` of all steps with
    decodes had such. The more had them, the fewer and lighter are those that had none: that these are faster
    than the model says little of steps with many decodes, unless those beside prompts are, too."""
    return plain + share * max(0.0, min(1.0, mixed) - plain)
