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

    Among feasible ones (see `_forecast`) D-heavy ones come first, so that P-heavy ones stay free for long
    prompts; then the fewest queued prompt tokens, the lowest prediction, the first in order. When none is
    feasible the lowest prediction is the least harm, with room in the KV if there is any.
    """
    move = _hand_over_seconds(request, instances, decoders, predictor)
    limits = _limits(request, slo, policy)
    waited = now - request.arrived_at
    late = waited if move is None else waited + move
    forecasts = [
        _forecast(request, i, late if i.kind is Kind.P_HEAVY else waited, limits, predictor, policy)
        for i in instances
    ]
    best = min(range(len(instances)), key=lambda n: _key(instances[n], forecasts[n]))
    chosen, forecast = instances[best], forecasts[best]
    if move is None or chosen.kind is not Kind.P_HEAVY:
        return Placement(chosen, False, forecast.ttft, tuple(forecasts), _why(forecast, chosen, limits[0]))
    ttft = forecast.ttft - move
    return Placement(chosen, True, ttft, tuple(forecasts), _why(forecast, chosen, limits[0]))


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
) -> Forecast:
    """What to expect of one instance; `to_come` is the time already waited and the move that would follow.

    Feasible means: TTFT is within its limit; the KV has room below the watermark (elsewhere the prompt would
    wait, or push somebody out); and the decodes of a D-heavy instance, this one among them, are predicted to
    stay within theirs.
    """
    prompt = request.prompt_tokens
    ttft = to_come + predictor.ttft(instance, prompt)
    fits = load_after(instance, prompt, policy) <= policy.full_mark
    feasible = fits and ttft <= limits[0]
    calm = True
    if feasible and instance.kind is Kind.D_HEAVY:
        feasible = calm = predictor.tpot(instance, prompt) <= limits[1]
    return Forecast(instance.name, ttft, instance.queued_prefill_tokens, feasible, fits, calm)


def _hand_over_seconds(
    request: Request, instances: Sequence[Instance], decoders: Sequence[Instance], predictor: Predictor
) -> float | None:
    """What the move after a prefill on a P-heavy instance will take; None where the decode would stay there.

    It stays if the request cannot move or is over with its first token, or nobody is D-heavy. One answer for
    all: a link is that of a pair of kinds, and asking for each pair would be the dearest part. The decode is
    expected on the D-heavy instance with most room now.
    """
    source = next((i for i in instances if i.kind is Kind.P_HEAVY), None)
    if source is None or not decoders or not request.movable or request.max_tokens <= 1:
        return None
    likely = min(decoders, key=lambda d: d.kv_usage)
    return predictor.move(source, likely, request.prompt_tokens)


def _key(instance: Instance, forecast: Forecast) -> tuple[float, ...]:
    """The lowest key is taken; the first of equal ones."""
    if forecast.feasible:
        return 0.0, instance.kind is Kind.P_HEAVY, forecast.queued_prefill_tokens, forecast.ttft
    return 1.0, not forecast.fits, forecast.ttft


def _why(forecast: Forecast, chosen: Instance, limit: float) -> str:
    if not forecast.feasible:
        return "none feasible: the lowest prediction"
    if chosen.kind is Kind.D_HEAVY:
        return f"D-heavy within {limit:g} s, fewest queued prompt tokens"
    return f"no D-heavy within {limit:g} s and its TPOT margin; P-heavy with fewest queued prompt tokens"
