"""Algorithm 2: length-aware prefill scheduling. Where does the prompt of a request go?

The length that counts is what must be computed: tokens whose KV an instance has, or gets before, cost nothing
there. No other weight draws a prompt to a cache: the price is the prediction, so load cannot pile up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taichi_serve.instance import Instance
from taichi_serve.latency.predict import Predictor
from taichi_serve.messages import Forecast
from taichi_serve.request import Request
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.prompt import UNKNOWN, Known, Prompt, hand_over_seconds, limits_of
from taichi_serve.scheduling.residency import NONE
from taichi_serve.sliders import Kind
from taichi_serve.slo import SLO


@dataclass(slots=True)
class Placement:
    """The instance that prefills, whether the decode runs elsewhere, and what was predicted for everyone.

    `ttft` is the prediction for the first token that the user gets (seconds from arrival). Forecasts add the
    move, as the paper does: it delays the second token, and so counts when instances are compared. `cached`
    prompt tokens need not be computed, `used` are in blocks that are in use there, and with `lender` the
    cached ones are fetched from there.
    """

    instance: Instance
    hand_over: bool
    ttft: float
    forecasts: tuple[Forecast, ...]
    why: str
    cached: int = 0
    used: int = 0
    lender: Instance | None = None


def choose_prefill(
    request: Request,
    now: float,
    instances: Sequence[Instance],
    decoders: Sequence[Instance],
    predictor: Predictor,
    policy: Policy,
    known: Known = UNKNOWN,
    beside: SLO | None = None,
) -> Placement:
    """Place the prompt of `request` on one of `instances` (not empty, all able to prefill).

    Among feasible ones (see `Prompt.forecast`) D-heavy ones come first, so that P-heavy ones stay free for
    long prompts; then the fewest prompt tokens to compute until it is through, the queue's and its own, the
    lowest prediction, the longest cached prefix, the first in order. When none is feasible the lowest
    prediction is the least harm, with room in the KV if there is any.
    """
    move = hand_over_seconds(request, instances, decoders, predictor, known)
    waited = now - request.arrived_at
    later = waited if move is None else waited + move
    limits = limits_of(request, beside or request.slo, policy)
    prompt = Prompt(request, waited, later, limits, predictor, policy)
    forecasts = [prompt.forecast(i, known) for i in instances]
    keys = [*map(prompt.key, instances, forecasts)]
    if known.lender is not None:
        _ask_for_fetches(prompt, instances, known, forecasts, keys)
    best = keys.index(min(keys))
    chosen, forecast = instances[best], forecasts[best]
    here = known.prefixes.get(chosen.name, NONE)
    lender = known.lender if forecast.cached > here.cached else None
    hand_over = move is not None and chosen.kind is Kind.P_HEAVY and not prompt.stays(chosen)
    ttft = forecast.ttft - move if move is not None and hand_over else forecast.ttft
    why = _why(forecast, chosen, prompt.limits.ttft, lender)
    return Placement(chosen, hand_over, ttft, tuple(forecasts), why, forecast.cached, here.claimed, lender)


def _ask_for_fetches(
    prompt: Prompt,
    instances: Sequence[Instance],
    known: Known,
    forecasts: list[Forecast],
    keys: list[tuple[float, ...]],
) -> None:
    """Put the forecast with a fetch in its place wherever it could win.

    With it they have equally much of the prompt, so the order of their queues is that of their keys, and
    whoever comes behind one that is feasible need not be asked.
    """
    lender, lent = known.lender, known.lent
    assert lender is not None
    could = []
    for number, (instance, alone) in enumerate(zip(instances, forecasts, strict=True)):
        if alone.fits and alone.cached < lent and instance is not lender:
            could.append((prompt.rank(instance), alone.queued_prefill_tokens - lent, number))
    could.sort()
    best = min(keys)
    before = _before(best, prompt.limits.ttft)
    for rank, to_compute, number in could:
        if (0.0, rank, to_compute) > best:
            return
        instance, alone = instances[number], forecasts[number]
        fetching = prompt.fetching(instance, alone, known, lender, before)
        if fetching is not alone:
            forecasts[number] = fetching
            keys[number] = key = prompt.key(instance, fetching)
            if key < best:
                best, before = key, _before(key, prompt.limits.ttft)


def _before(best: tuple[float, ...], limit: float) -> float:
    """The TTFT that would not be too late to win against the best key so far, which may be feasible, or not,
    or without room."""
    if best[0] < 2.0:
        return limit
    return float("inf") if best[1] else max(limit, best[2])


def _why(forecast: Forecast, chosen: Instance, limit: float, lender: Instance | None) -> str:
    if not forecast.feasible:
        why = "none feasible: the lowest prediction"
    elif chosen.kind is Kind.D_HEAVY:
        why = f"D-heavy within {limit:g} s, fewest prompt tokens to compute"
    else:
        why = (
            f"no D-heavy within {limit:g} s and its TPOT margin; P-heavy with fewest prompt tokens to compute"
        )
    if lender is not None:
        return f"{why}; fetches the KV of {forecast.cached} tokens from {lender.name}"
    return f"{why}; {forecast.cached} tokens are cached there" if forecast.cached else why
