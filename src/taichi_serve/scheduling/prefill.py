"""Algorithm 2: length-aware prefill scheduling. Where does the prompt of a request go?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taichi_serve.instance import Instance
from taichi_serve.latency.predict import Predictor
from taichi_serve.messages import Forecast
from taichi_serve.request import Request
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.room import load_after
from taichi_serve.sliders import Kind
from taichi_serve.slo import SLO


@dataclass(frozen=True, slots=True)
class Placement:
    """The instance that prefills, whether the decode runs elsewhere, and what was predicted for everyone.

    `ttft` is the prediction for the first token that the user gets (seconds from arrival). Forecasts add the
    move, as the paper does: it delays the second token, and so counts when instances are compared.
    """

    instance: Instance
    hand_over: bool
    ttft: float
    forecasts: tuple[Forecast, ...]
    why: str


def choose_prefill(
    request: Request,
    now: float,
    instances: Sequence[Instance],
    decoders: Sequence[Instance],
    predictor: Predictor,
    slo: SLO,
    policy: Policy,
) -> Placement:
    """Place the prompt of `request` on one of `instances` (not empty, all able to prefill).

    Feasible is an instance whose predicted TTFT (time already waited + queue + execution + the move, if the
    decode runs elsewhere, on one of `decoders`) is within the margin of the SLO, and whose KV has room below
    the watermark: elsewhere the prompt would wait, or push somebody out. Among feasible ones D-heavy ones
    come first, so that P-heavy ones stay free for long prompts; then the fewest queued prompt tokens, the
    lowest prediction, the first in order. When none is feasible the lowest prediction is the least harm,
    with room if there is any.
    """
    # A request that can never move decodes where it prefills: it may use the whole TTFT SLO to get a
    # low-interference instance, because nothing can repair its TPOT later.
    limit = slo.ttft * (policy.ttft_margin if request.movable else 1.0)
    move = _hand_over_seconds(request, instances, decoders, predictor)
    waited = now - request.arrived_at
    forecasts = []
    best_key: tuple[float, ...] | None = None
    best = 0
    for position, instance in enumerate(instances):
        to_come = move if hands_over(request, instance, decoders) else 0.0
        ttft = waited + predictor.ttft(instance, request.prompt_tokens) + to_come
        queued = instance.queued_prefill_tokens
        fits = load_after(instance, request.prompt_tokens, policy) <= policy.full_mark
        feasible = fits and ttft <= limit
        forecasts.append(Forecast(instance.name, ttft, queued, feasible, fits))
        key = _key(instance, ttft, queued, fits, feasible)
        if best_key is None or key < best_key:
            best_key, best = key, position
    chosen = instances[best]
    elsewhere = hands_over(request, chosen, decoders)
    return Placement(
        chosen,
        elsewhere,
        forecasts[best].ttft - (move if elsewhere else 0.0),
        tuple(forecasts),
        _why(forecasts[best], chosen, limit),
    )


def _hand_over_seconds(
    request: Request, instances: Sequence[Instance], decoders: Sequence[Instance], predictor: Predictor
) -> float:
    """What the move after prefill will take: from any P-heavy instance to the D-heavy one with most room now.

    One answer for all, because a link is that of a pair of kinds; asking for each would be the dearest part.
    """
    likely = min(decoders, key=lambda d: d.kv_usage, default=None)
    source = next((i for i in instances if i.kind is Kind.P_HEAVY), None)
    return predictor.move(source, likely, request.prompt_tokens) if source and likely else 0.0


def _key(instance: Instance, ttft: float, queued: int, fits: bool, feasible: bool) -> tuple[float, ...]:
    """The lowest key is taken; the first of equal ones."""
    if feasible:
        return 0.0, instance.kind is Kind.P_HEAVY, queued, ttft
    return 1.0, not fits, ttft


def _why(forecast: Forecast, chosen: Instance, limit: float) -> str:
    if not forecast.feasible:
        return f"none within {limit:g} s with room: the lowest prediction"
    if chosen.kind is Kind.D_HEAVY:
        return f"D-heavy within {limit:g} s, fewest queued prompt tokens"
    return f"no D-heavy within {limit:g} s; P-heavy with fewest queued prompt tokens"


def hands_over(request: Request, instance: Instance, decoders: Sequence[Instance]) -> bool:
    """Whether the decode runs elsewhere: it leaves a P-heavy instance if there is a D-heavy one."""
    return request.movable and instance.kind is Kind.P_HEAVY and bool(decoders)
