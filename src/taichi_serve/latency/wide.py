"""The two predictors for all instances at once. Each formula stands in the predictor's own file, with its
reasons; here it is written for arrays, and tests hold the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from taichi_serve.instance import Instance
from taichi_serve.latency.columns import Columns, Floats, Wide
from taichi_serve.latency.model import prompt_attention
from taichi_serve.latency.predict import FRESH, HALF, Average, Learned, Predictor
from taichi_serve.latency.profiled import Profiled, bounded
from taichi_serve.sliders import Kind

NEVER = math.inf  # when an instance was seen that made no step: nothing is known that could be old


def wide(predictor: Predictor) -> Wide | None:
    """This predictor for all instances at once; None where it can only be asked about one."""
    of = WIDE.get(type(predictor))
    return None if of is None else of(predictor)


def _kept(idle: Floats) -> Floats:
    kept: Floats = np.exp2((FRESH - np.maximum(idle, FRESH)) / HALF)
    return kept


def _relaxed(values: Floats, usual: float, idle: Floats) -> Floats:
    """What is believed of instances that were last seen `idle` seconds ago (predict.relaxed)."""
    doubtful = (values > usual) & (idle > FRESH)
    if not doubtful.any():
        return values
    return np.where(doubtful, usual + (values - usual) * _kept(idle), values)


def _alike(looks: Floats, now: float, times: tuple[int, ...]) -> Floats:
    for place in times:
        fresh = now - looks[place] <= FRESH
        looks[place, fresh] = NEVER
    return looks


class WideProfiled:
    """Profiled, for all instances at once."""

    def __init__(self, predictor: Profiled) -> None:
        self.predictor = predictor

    def look(self, instance: Instance) -> tuple[float, ...]:
        """Both biases, the usual prompt tokens of a step, the share of steps with some, and when."""
        seen = self.predictor.seen.get(instance.name)
        if seen is None:
            return 1.0, 1.0, 0.0, 0.0, NEVER
        return seen.mixed_bias, seen.plain_bias, seen.usual, seen.share.value(0.0), seen.at

    def alike(self, columns: Columns, rows: npt.NDArray[np.intp]) -> Floats:
        """The same, but for times that do not count yet."""
        return _alike(columns.looks[:, rows], self.predictor.now, (4,))

    def ttfts(self, columns: Columns, prompt_tokens: int, cached: Floats | int) -> Floats:
        """Seconds until the first token."""
        model, here = self.predictor.model, columns
        token, floor, running = model.token, model.token * model.knee, here.running
        mixed, _, usual, *_ = here.looks
        plain = self._plain(here)
        beside = plain + model.mixed
        left = here.ahead - running + (prompt_tokens - cached)
        full = np.floor(left / here.chunk)
        rest = left - full * here.chunk
        shared = (running > 0.0) & (rest < usual)
        filled = np.where(shared, np.minimum(here.chunk, np.floor(usual)), rest)
        seconds: Floats = full * (beside + np.maximum(floor, token * (here.chunk + here.decodes)))
        seconds += (rest > 0.0) * (beside + np.maximum(floor, token * (filled + here.decodes)))
        own = (prompt_tokens * (prompt_tokens + 1) - cached * (cached + 1)) / 2
        busy = running + here.decodes
        step = np.where(running > 0.0, beside, plain) + np.maximum(floor, token * busy)
        seconds += np.where(busy > 0.0, step / 2, 0.0)
        seconds += model.attention * (own + here.attended * (here.ahead - running / 2))
        seconds *= self._biases(here, mixed)
        return seconds

    def works(self, columns: Columns, prompt_tokens: int) -> Floats:
        """Seconds that a prompt adds to each queue."""
        model, here = self.predictor.model, columns
        step = self._plain(here) + model.mixed
        step += model.token * np.maximum(model.knee, here.chunk + here.decodes)
        seconds: Floats = prompt_tokens / here.chunk * step + model.attention * prompt_attention(
            prompt_tokens
        )
        return seconds * self._biases(here, here.looks[0])

    def sinces(self, columns: Columns, now: float) -> Floats:
        """Seconds that are left of the steps that run, beside the half of them."""
        model, here = self.predictor.model, columns
        busy = here.running + here.decodes
        step = self._plain(here) + model.token * np.maximum(model.knee, busy)
        prompts = here.running > 0.0
        step += np.where(prompts, model.mixed + model.attention * here.running * here.attended, 0.0)
        step *= np.where(prompts, here.looks[0], here.looks[1])
        left = np.maximum(0.0, step - (now - here.stepped_at)) - step / 2
        return np.where(busy > 0.0, left, 0.0)

    def tpots(self, columns: Columns, kv_tokens: int) -> Floats:
        """Seconds of a mean step."""
        model, here = self.predictor.model, columns
        mixed, plain, usual, share, at = here.looks
        decodes = here.decodes + (1 if kv_tokens else 0)
        alone = model.launch + model.decode * decodes + model.kv * (here.context + kv_tokens)
        idle = self.predictor.now - at
        seconds = (alone + model.token * np.maximum(model.knee, decodes)) * self._biases(here, plain)
        step = alone + model.token * np.maximum(model.knee, usual + decodes)
        step += model.mixed + model.attention * usual * here.attended
        among = share * _kept(idle)
        together: Floats = (1.0 - among) * seconds + among * step * self._biases(here, mixed)
        return together

    def fetches(self, columns: Columns, lender: Instance, kv_tokens: Floats | int) -> Floats:
        """Seconds that copying takes from this instance to each."""
        size, found = np.asarray(kv_tokens) * self.predictor.bytes_per_token, []
        for kind in (Kind.D_HEAVY, Kind.P_HEAVY):
            link, bias = self.predictor.link(lender.kind, kind)
            found.append((link.latency + size / link.bytes_per_second) * bias)
        low, high = found
        return np.where(columns.low, low, high)

    def _plain(self, here: Columns) -> Floats:
        model = self.predictor.model
        return model.launch + model.decode * here.decodes + model.kv * here.context

    def _biases(self, here: Columns, biases: Floats) -> Floats:
        idle = self.predictor.now - here.looks[4]
        return _relaxed(biases, bounded(self.predictor.usual.value(1.0)), idle)


class WideLearned:
    """Learned, for all instances at once."""

    def __init__(self, predictor: Learned) -> None:
        self.predictor = predictor

    def look(self, instance: Instance) -> tuple[float, ...]:
        """The fixed time of a step and when it was seen, the time per step with decodes and when."""
        known = self.predictor
        fixed = self._seen(known.fixed.get(instance.name), 0.0)
        return *fixed, *self._seen(known.steps.get(instance.name), known.seconds_per_step), 0.0

    @staticmethod
    def _seen(known: Average | None, default: float) -> tuple[float, float]:
        if known is None or not known.below:
            return default, NEVER
        return known.value(default), known.at

    def alike(self, columns: Columns, rows: npt.NDArray[np.intp]) -> Floats:
        """The same, but for times that do not count yet."""
        return _alike(columns.looks[:, rows], self.predictor.now, (1, 3))

    def ttfts(self, columns: Columns, prompt_tokens: int, cached: Floats | int) -> Floats:
        """Seconds until the first token."""
        tokens = columns.ahead + (prompt_tokens - cached)
        steps = np.ceil(tokens / columns.chunk)
        seconds: Floats = steps * self._fixed(columns) + tokens * self._token
        return seconds

    def works(self, columns: Columns, prompt_tokens: int) -> Floats:
        """Seconds that a prompt adds to each queue."""
        seconds: Floats = prompt_tokens * (self._fixed(columns) / columns.chunk + self._token)
        return seconds

    def sinces(self, columns: Columns, now: float) -> Floats:
        """Seconds that are over of the steps that run."""
        step = self._fixed(columns) + columns.running * self._token
        return np.where(columns.running > 0.0, -np.minimum(now - columns.stepped_at, step), 0.0)

    def tpots(self, columns: Columns, kv_tokens: int) -> Floats:
        """Seconds of a step with decodes in it."""
        return self._believed(columns.looks[2], columns.looks[3])

    def fetches(self, columns: Columns, lender: Instance, kv_tokens: Floats | int) -> Floats:
        """Seconds that copying takes from this instance to each."""
        known = self.predictor
        share = np.maximum(1.0, np.asarray(kv_tokens) / known.moved.value(math.inf))
        seconds: Floats = known.gaps.value(known.move_seconds) * share
        return np.broadcast_to(seconds, columns.chunk.shape)

    @property
    def _token(self) -> float:
        return self.predictor.prefill.value(self.predictor.seconds_per_prompt_token)

    def _fixed(self, columns: Columns) -> Floats:
        return self._believed(columns.looks[0], columns.looks[1])

    def _believed(self, values: Floats, at: Floats) -> Floats:
        usual = self.predictor.usual
        if not usual.below:
            return values
        return _relaxed(values, usual.value(0.0), self.predictor.now - at)


# By exact type: who changes an answer of one of these in a class of its own has not changed the array's.
WIDE: dict[type, Callable[..., Wide]] = {Profiled: WideProfiled, Learned: WideLearned}
