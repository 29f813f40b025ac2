"""Algorithm 2: length-aware prefill scheduling. Where does the prompt of a request go?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taichi_serve.instance import Instance
from taichi_serve.latency.predict import Predictor
from taichi_serve.messages import Forecast
from taichi_serve.request import Request
from taichi_serve.scheduling.policy import Policy
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
    decode runs elsewhere, on one of `decoders`) is within the margin of the SLO. Among feasible ones D-heavy
    ones come first, so that P-heavy ones stay free for long prompts; then the fewest queued prompt tokens,
    the lowest prediction, the first in order. When none is feasible the lowest prediction is the least harm.
    """
    # A request that can never move decodes where it prefills: it may use the whole TTFT SLO to get a
    # low-interference instance, because nothing can repair its TPOT later.
    limit = slo.ttft * (policy.ttft_margin if request.movable else 1.0)
    # The decode is expected where there is most room now; one guess for all keeps this linear in instances.
    likely = min(decoders, key=lambda d: d.kv_usage, default=None)
    forecasts = []
    best_key: tuple[float, ...] | None = None
    best, best_move = 0, 0.0
    for position, instance in enumerate(instances):
        move = 0.0
        if likely is not None and hands_over(request, instance, decoders):
            move = predictor.move(instance, likely, request.prompt_tokens)
        ttft = now - request.arrived_at + predictor.ttft(instance, request.prompt_tokens) + move
        queued = instance.queued_prefill_tokens
        feasible = ttft <= limit
        forecasts.append(Forecast(instance.name, ttft, queued, feasible))
        key = (0.0, instance.kind is Kind.P_HEAVY, queued, ttft) if feasible else (1.0, ttft, queued, 0.0)
        if best_key is None or key < best_key:
            best_key, best, best_move = key, position, move
    chosen = instances[best]
    return Placement(
        chosen,
        hands_over(request, chosen, decoders),
        forecasts[best].ttft - best_move,
        tuple(forecasts),
        _why(forecasts[best], chosen, limit),
    )


def _why(forecast: Forecast, chosen: Instance, limit: float) -> str:
    if not forecast.feasible:
        return f"none within {limit:g} s: the lowest prediction"
    if chosen.kind is Kind.D_HEAVY:
        return f"D-heavy within {limit:g} s, fewest queued prompt tokens"
    return f"no D-heavy within {limit:g} s; P-heavy with fewest queued prompt tokens"


def hands_over(request: Request, instance: Instance, decoders: Sequence[Instance]) -> bool:
    """Whether the decode runs elsewhere: it leaves a P-heavy instance if there is a D-heavy one."""
    return request.movable and instance.kind is Kind.P_HEAVY and bool(decoders)
