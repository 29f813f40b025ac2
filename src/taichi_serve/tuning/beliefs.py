"""What is believed of the instances by now, from what the predictor learned of their steps."""

from __future__ import annotations

from collections import deque

from taichi_serve.instance import Instance
from taichi_serve.latency.fit import Sample
from taichi_serve.latency.model import Batch, Roofline
from taichi_serve.latency.predict import Average, Learned, Predictor
from taichi_serve.latency.profile import Transfer
from taichi_serve.latency.profiled import UNMEASURED, Profiled, bounded
from taichi_serve.messages import Stepped
from taichi_serve.sliders import Kind
from taichi_serve.tuning.rehearsal import Limits, Plant

# Steps of either sort that a model without a profile is fitted to, and at least so many.
KEPT, ENOUGH = 400, 60


class Beliefs:
    """Step times as they were seen. With a profile the predictor has all of it; without one some steps are
    remembered, and the model is fitted to these."""

    def __init__(self, limits: Limits, predictor: Predictor) -> None:
        self.limits = limits
        self.predictor = predictor
        self._mixed: deque[Sample] = deque(maxlen=KEPT)
        self._plain: deque[Sample] = deque(maxlen=KEPT)

    def stepped(self, instance: Instance, step: Stepped) -> None:
        """See a step; `instance` is as it was before."""
        if isinstance(self.predictor, Profiled) or not (step.prefill_tokens or step.decodes):
            return
        queued = instance.queued_tokens
        pairs = instance.queued_attention / queued * step.prefill_tokens if queued else 0.0
        batch = Batch(step.prefill_tokens, pairs, step.decodes, instance.context_tokens)
        (self._mixed if step.prefill_tokens else self._plain).append(Sample(batch, step.seconds))

    def plant(self) -> Plant | None:
        """The instances for a rehearsal; None while too little is known."""
        predictor = self.predictor
        if isinstance(predictor, Profiled):
            mixed, plain = Average(), Average()
            for seen in predictor.seen.values():
                mixed.add(seen.mixed.above, seen.mixed.below, 1.0)
                plain.add(seen.plain.above, seen.plain.below, 1.0)
            transfers = tuple(predictor.transfers.values()) or (UNMEASURED,)
            return self._made(
                predictor.model, (), bounded(mixed.value(1.0)), bounded(plain.value(1.0)), transfers
            )
        if min(len(self._mixed), len(self._plain)) < ENOUGH:
            return None
        return self._made(None, (*self._mixed, *self._plain), 1.0, 1.0, self._links(predictor))

    def _made(
        self,
        model: Roofline | None,
        steps: tuple[Sample, ...],
        mixed: float,
        plain: float,
        transfers: tuple[Transfer, ...],
    ) -> Plant:
        return Plant(model, steps, mixed, plain, self.limits, transfers)

    def _links(self, predictor: Predictor) -> tuple[Transfer, ...]:
        """As fast as moves were: all of a gap counts as latency."""
        gap = predictor.gaps.value(predictor.move_seconds) if isinstance(predictor, Learned) else 0.05
        return tuple(Transfer(a, b, gap, 1e12) for a in Kind for b in Kind)
