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
from taichi_serve.scheduling.residency import NONE, NOTHING, Prefixes
from taichi_serve.scheduling.room import load_after
from taichi_serve.sliders import Kind
from taichi_serve.slo import SLO


@dataclass(frozen=True, slots=True)
class Known:
    """What the instances have of a prompt, and from whom a prefix may be fetched: the first `lent` tokens,
    after `behind` seconds in which others are copied from there."""

    prefixes: Prefixes
    lender: Instance | None = None
    lent: int = 0
    behind: float = 0.0


UNKNOWN = Known(NOTHING)


@dataclass(frozen=True, slots=True)
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
    slo: SLO,
    policy: Policy,
    known: Known = UNKNOWN,
) -> Placement:
    """Place the prompt of `request` on one of `instances` (not empty, all able to prefill).

    Among feasible ones (see `_forecast`) D-heavy ones come first, so that P-heavy ones stay free for long
    prompts; then the fewest prompt tokens to compute until it is through, the queue's and its own, the lowest
    prediction, the longest cached prefix, the first in order. When none is feasible the lowest prediction is
    the least harm, with room in the KV if there is any.
    """
    move = _hand_over_seconds(request, instances, decoders, predictor, known)
    limits = _limits(request, slo, policy)
    waited = now - request.arrived_at
    late = waited if move is None else waited + move
    forecasts = [
        _forecast(request, i, late if i.kind is Kind.P_HEAVY else waited, limits, predictor, policy, known)
        for i in instances
    ]
    keys = [*map(_key, instances, forecasts)]
    best = keys.index(min(keys))
    chosen, forecast = instances[best], forecasts[best]
    here = known.prefixes.get(chosen.name, NONE)
    lender = known.lender if forecast.cached > here.cached else None
    hand_over = move is not None and chosen.kind is Kind.P_HEAVY
    ttft = forecast.ttft - move if move is not None and hand_over else forecast.ttft
    why = _why(forecast, chosen, limits[0], lender)
    return Placement(chosen, hand_over, ttft, tuple(forecasts), why, forecast.cached, here.claimed, lender)


def _limits(request: Request, slo: SLO, policy: Policy) -> tuple[float, float]:
    """The TTFT and the TPOT (seconds) up to which an instance is feasible.

    A request that can never move decodes where it prefills, and nothing can repair its TPOT later: it may use
    the whole TTFT SLO to get a low-interference instance, however busy the decodes there are.
    """
    if request.movable:
        return slo.ttft * policy.ttft_margin, slo.tpot * policy.tpot_margin
    return slo.ttft, float("inf")


def _forecast(
    request: Request,
    instance: Instance,
    to_come: float,
    limits: tuple[float, float],
    predictor: Predictor,
    policy: Policy,
    known: Known,
) -> Forecast:
    """What to expect of one instance; `to_come` is the time already waited and the move that would follow.

    Feasible means: TTFT is within its limit; the KV has room below the watermark (elsewhere the prompt would
    wait, or push somebody out); and the decodes of a D-heavy instance, this one among them, are predicted to
    stay within theirs.
    """
    prompt = request.prompt_tokens
    here = known.prefixes.get(instance.name)
    cached, used = (0, 0) if here is None else (here.cached, here.claimed)
    ttft = predictor.ttft(instance, prompt, cached)
    fits = load_after(instance, prompt - used, policy) <= policy.full_mark
    if fits and known.lent > cached and instance is not known.lender:
        fetched = _fetched(prompt, instance, cached, ttft, predictor, policy, known)
        if fetched < ttft:
            ttft, cached = fetched, known.lent
    ttft += to_come
    feasible = fits and ttft <= limits[0]
    calm = True
    if feasible and instance.kind is Kind.D_HEAVY:
        feasible = calm = predictor.tpot(instance, prompt) <= limits[1]
    return Forecast(instance.name, ttft, instance.queued_prefill_tokens, feasible, fits, calm, cached)


def _fetched(
    prompt: int,
    instance: Instance,
    cached: int,
    computed: float,
    predictor: Predictor,
    policy: Policy,
    known: Known,
) -> float:
    """TTFT (seconds from now) if what the instance lacks of the prefix is copied while the prompt waits in
    its queue, which is a part of the time it takes `computed`; what is left of the copying delays it. What
    comes too late for the cluster is `computed`."""
    assert known.lender is not None
    copied = known.behind + predictor.fetch(known.lender, instance, known.lent - cached)
    if copied >= computed:
        return copied
    queued = instance.queued_prefill_tokens
    queue = computed * queued / (queued + prompt - cached)
    if max(copied, queue) > policy.fetch_within:
        return computed
    return max(0.0, copied - queue) + predictor.ttft(instance, prompt, known.lent)


def _hand_over_seconds(
    request: Request,
    instances: Sequence[Instance],
    decoders: Sequence[Instance],
    predictor: Predictor,
    known: Known,
) -> float | None:
    """What the move after a prefill on a P-heavy instance will take; None where the decode would stay there.

    It stays if the request cannot move or is over with its first token, or nobody is D-heavy. One answer for
    all: a link is that of a pair of kinds, and asking for each pair would be the dearest part. The decode is
    expected on the D-heavy instance with most room now, what it has of the prompt counted as room.
    """
    source = next((i for i in instances if i.kind is Kind.P_HEAVY), None)
    if source is None or not decoders or not request.movable or request.max_tokens <= 1:
        return None
    if not known.prefixes:
        return predictor.move(source, min(decoders, key=lambda d: d.kv_usage), request.prompt_tokens)
    held = {d.name: known.prefixes.get(d.name, NONE).held for d in decoders}
    likely = min(decoders, key=lambda d: (d.kv_tokens - held[d.name]) / d.kv_capacity)
    return predictor.move(source, likely, request.prompt_tokens, held[likely.name])


def _key(instance: Instance, forecast: Forecast) -> tuple[float, ...]:
    """The lowest key is taken; the first of equal ones. The prompt's length is the same for all of them: what
    is cached is taken off the queue in its place."""
    if forecast.feasible:
        to_compute = forecast.queued_prefill_tokens - forecast.cached
        return 0.0, instance.kind is Kind.P_HEAVY, to_compute, forecast.ttft, -forecast.cached
    return 1.0, not forecast.fits, forecast.ttft, -forecast.cached


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
