"""A prompt that is to be placed: what is known of it, up to when an instance is feasible for it, and what to
expect of one instance. Which instance it gets is in prefill.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from taichi_serve.instance import Instance
from taichi_serve.latency.links import EVEN, Links
from taichi_serve.latency.predict import Predictor
from taichi_serve.messages import Forecast
from taichi_serve.request import Request
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.residency import NOTHING, Prefixes
from taichi_serve.scheduling.room import load_after, roomiest
from taichi_serve.sliders import Kind
from taichi_serve.slo import SLO


@dataclass(slots=True)
class Behind:
    """What is queued on an instance and comes after a newcomer: prompt tokens, and the seconds by which its
    TTFT is shorter than predicted for the end of the queue."""

    tokens: int = 0
    seconds: float = 0.0
    reserve: float = 0.0  # of these seconds, negative: time that is kept free for longer prompts


ALL_BEFORE = Behind()


@dataclass(slots=True)
class Known:
    """What the instances have of a prompt, and from whom a prefix may be fetched: the first `lent` tokens,
    after `behind` seconds in which others are copied from there. `overtaken` is what comes after the prompt
    where not all that is queued comes before it."""

    prefixes: Prefixes
    lender: Instance | None = None
    lent: int = 0
    behind: float = 0.0
    overtaken: Mapping[str, Behind] = field(default_factory=dict)
    links: Links = EVEN  # what copying over them costs


UNKNOWN = Known(NOTHING)


@dataclass(slots=True)
class Limits:
    """Seconds up to which an instance is feasible: `ttft` by the prompt's own SLO, `quick` by the strictest
    beside it, `tpot` by the strictest too, for it is that of decodes which are there. `bears` is the TPOT
    up to which its own decode stays on a P-heavy instance, and `mark` the share of KV up to which it fits."""

    ttft: float
    quick: float
    tpot: float
    bears: float
    mark: float


def limits_of(request: Request, beside: SLO, policy: Policy) -> Limits:
    """By the SLO of the request, and the strictest of all that are served.

    A request that can never move decodes where it prefills, and nothing can repair its TPOT later: it may use
    the whole TTFT SLO to get a low-interference instance, however busy the decodes there are.
    """
    slo = request.slo
    if not request.movable:
        return Limits(slo.ttft, slo.ttft, float("inf"), 0.0, policy.full_mark)
    loose = policy.degrades and slo.tpot > beside.tpot
    ttft, tpot = policy.ttft_margin, policy.tpot_margin
    bears = slo.tpot * tpot if loose else 0.0
    return Limits(slo.ttft * ttft, beside.ttft * ttft, beside.tpot * tpot, bears, policy.full_mark)


@dataclass(slots=True)
class Prompt:
    """A prompt that is to be placed, and by what. It has `waited`, and is through so much `later` where
    a move would follow its prefill, both in seconds."""

    request: Request
    waited: float
    later: float
    limits: Limits
    predictor: Predictor
    policy: Policy

    def forecast(self, instance: Instance, known: Known) -> Forecast:
        """What to expect of one instance, with what it has itself."""
        prompt, prefixes, cached, used = self.request.prompt_tokens, known.prefixes, 0, 0
        if prefixes and (here := prefixes.get(instance.name)) is not None:
            _, cached, used = here
            cached = used if used > cached else cached
        after = known.overtaken.get(instance.name, ALL_BEFORE) if known.overtaken else ALL_BEFORE
        room = load_after(instance, prompt - used - after.tokens, self.policy) <= self.limits.mark
        fits = room and instance.seats_left > 0
        ttft = self.predictor.ttft(instance, prompt, cached)
        if after.seconds:
            ttft = max(0.0, ttft - after.seconds)
        return self._judged(instance, ttft, cached, fits, after.tokens)

    def _judged(self, instance: Instance, ttft: float, cached: int, fits: bool, after: int) -> Forecast:
        """Feasible means: TTFT is within its limit; it fits: the KV has room below the watermark, and there
        is a seat (elsewhere the prompt would wait, or push somebody out); and the decodes of a D-heavy
        instance, this one among them, are predicted to stay within theirs."""
        limits, low = self.limits, instance.kind is Kind.D_HEAVY
        ttft += self.waited if low else self.later
        feasible = fits and ttft <= limits.ttft
        calm = True
        if feasible and low:
            tpot = self.predictor.tpot(instance, self.request.prompt_tokens)
            feasible = calm = tpot <= limits.tpot
        queued = instance.queued_tokens - instance.progress_tokens - after
        return Forecast(instance.name, ttft, queued if queued > 0 else 0, feasible, fits, calm, cached)

    def stays(self, instance: Instance) -> bool:
        """Whether the decode of a loose request would keep its TPOT SLO on this P-heavy instance."""
        bears = self.limits.bears
        return bears > 0.0 and self.predictor.tpot(instance, self.request.prompt_tokens) <= bears

    def key(self, instance: Instance, forecast: Forecast) -> tuple[float, ...]:
        """The lowest key is taken; the first of equal ones. The prompt's length is the same for all of them:
        what is cached is taken off the queue in its place."""
        if not forecast.feasible:
            return 2.0, not forecast.fits, forecast.ttft, -forecast.cached
        limits = self.limits
        slow = 1.0 if forecast.ttft > limits.quick else 0.0
        rank = 1.0 if instance.kind is Kind.D_HEAVY else self.rank(instance) if limits.bears else 2.0
        to_compute = forecast.queued_prefill_tokens - forecast.cached
        return slow, rank, to_compute, forecast.ttft, -forecast.cached

    def rank(self, instance: Instance) -> float:
        """Which kind comes first: D-heavy, so that P-heavy ones stay free for long prompts; but P-heavy for a
        loose request whose decode can stay there, so that D-heavy ones stay free for strict ones."""
        if instance.kind is Kind.D_HEAVY:
            return 1.0
        return 0.0 if self.stays(instance) else 2.0

    def fetching(
        self, instance: Instance, alone: Forecast, known: Known, lender: Instance, before: float
    ) -> Forecast:
        """What to expect if the instance gets the prefix from the lender, where that is better than `alone`.

        It is copied while the prompt waits in the queue, and what is left of that time delays the prompt.
        Nothing is fetched that takes longer than computing it or that the cluster would give up, nor where
        the first token cannot be there `before` so many seconds after the arrival.
        """
        prompt, queued = self.request.prompt_tokens, alone.queued_prefill_tokens
        to_come = self.waited if instance.kind is Kind.D_HEAVY else self.later
        computed, within = alone.ttft - to_come, min(before - to_come, self.policy.fetch_within)
        queue = computed * queued / (queued + prompt - alone.cached)  # its part of that time
        if queue > within:
            return alone
        copied = self.predictor.fetch(lender, instance, known.lent - alone.cached)
        if not known.links.even:
            copied *= known.links.dearer(lender, instance)
        copied += known.behind
        if copied > within or copied >= computed:
            return alone
        after = known.overtaken.get(instance.name, ALL_BEFORE)
        later = max(0.0, self.predictor.ttft(instance, prompt, known.lent) - after.seconds)
        ttft = max(0.0, copied - queue) + later
        if ttft >= computed:
            return alone
        return self._judged(instance, ttft, known.lent, alone.fits, after.tokens)


def hand_over_seconds(
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
    if not decoders or not request.movable or request.max_tokens <= 1:
        return None
    for source in instances:
        if source.kind is Kind.P_HEAVY:
            break
    else:
        return None
    likely, held = roomiest(decoders, known.prefixes)
    return predictor.move(source, likely, request.prompt_tokens, held)
