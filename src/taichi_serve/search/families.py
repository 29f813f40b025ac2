"""What the search tunes: the members of aggregation, disaggregation and hybrid.

The hybrid is everything between the ends of the sliders, and the ends as well: every ratio, chunks of D-heavy
instances from 0 up, degrading or none. So a tuned hybrid is never behind a baseline for want of its settings;
where one of the ends is best, `end_of` says which, from the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from taichi_serve.scheduling.policy import Policy
from taichi_serve.search.goodput import Contender
from taichi_serve.sliders import Sliders

CHUNKS = (128, 192, 256, 384, 512, 768, 1024, 2048)  # of aggregation, beside whole prompts
D_CHUNKS = (0, 32, 64, 128, 256, 512, 1024)
MARGINS = (0.3, 0.75, 1.0)


def aggregation(instances: int, longest: int) -> list[Contender]:
    """Every instance alike: Sarathi-Serve's chunks, and Orca's whole prompts."""
    policy = Policy(ttft_margin=1.0)
    chunks = [c for c in CHUNKS if c < longest] + [longest]
    return [Contender(f"aggregation {c}", Sliders(0, instances, 0, c), policy) for c in chunks]


def disaggregation(instances: int, longest: int) -> list[Contender]:
    """P instances that only prefill whole prompts, D instances that only decode; nobody is degraded."""
    policy = Policy(ttft_margin=1.0, watermark=1.0)
    return [
        Contender(f"{p}P{instances - p}D", Sliders(p, instances - p, longest, 0), policy)
        for p in range(1, instances)
    ]


def hybrid(instances: int, longest: int) -> list[Contender]:
    """R_PD x S_D with whole prompts on P-heavy instances, and both ends; `nearby` then tries the neighbours
    of the best, smaller S_P among them, and the policy's knobs.

    With more than 15 instances only every second ratio is here, or fewer: the neighbours have the others.
    """
    between = [
        mixed(Sliders(p, instances - p, longest, d_chunk), Policy())
        for p in range(1, instances, max(1, instances // 8))
        for d_chunk in D_CHUNKS
        if d_chunk <= longest
    ]
    return between + disaggregation(instances, longest) + aggregation(instances, longest)


FAMILIES: dict[str, Callable[[int, int], list[Contender]]] = {
    "aggregation": aggregation,
    "disaggregation": disaggregation,
    "hybrid": hybrid,
}


def mixed(sliders: Sliders, policy: Policy) -> Contender:
    """A hybrid under a name that says all that was tuned."""
    name = f"{sliders.p_heavy}P{sliders.d_heavy}D S_P {sliders.p_chunk} S_D {sliders.d_chunk}"
    name += f" margin {policy.ttft_margin:g}"
    if (policy.watermark, policy.alpha) != (Policy().watermark, Policy().alpha):
        name += f" watermark {policy.watermark:g} alpha {policy.alpha:g}"
    if policy.tpot_margin != Policy().tpot_margin:
        name += f" TPOT margin {policy.tpot_margin:g}"
    return Contender(name, sliders, policy)


def end_of(contender: Contender) -> str | None:
    """Which end of the sliders these values are; None for what lies between."""
    if contender.sliders.p_heavy == 0:
        return "aggregation"
    if contender.sliders.d_chunk == 0 and not contender.policy.degrades:
        return "disaggregation"
    return None


def nearby(contender: Contender, knobs: bool = False) -> list[Contender]:
    """The contender, and those that differ from it in one thing; an end has been tuned by itself. With
    `knobs` more of the policy's are tried."""
    if end_of(contender):
        return [contender]
    policy = contender.policy
    others = [mixed(s, policy) for s in _sliders_nearby(contender.sliders)]
    return [contender, *others, *(mixed(contender.sliders, p) for p in _policies_nearby(contender, knobs))]


def _sliders_nearby(s: Sliders) -> Iterable[Sliders]:
    for more in (-1, 1):
        if s.p_heavy + more and s.d_heavy - more:
            yield replace(s, p_heavy=s.p_heavy + more, d_heavy=s.d_heavy - more)
    for d_chunk in (s.d_chunk * 3 // 4, s.d_chunk * 3 // 2) if s.d_chunk else (16,):
        if d_chunk <= s.p_chunk:
            yield replace(s, d_chunk=d_chunk)
    for p_chunk in (s.p_chunk // 2, s.p_chunk // 4):
        if p_chunk >= max(1, s.d_chunk):
            yield replace(s, p_chunk=p_chunk)


def _policies_nearby(contender: Contender, knobs: bool) -> Iterable[Policy]:
    policy = contender.policy
    # Without prompts on D-heavy instances the margin has nothing to choose between.
    for margin in MARGINS if contender.sliders.d_chunk else ():
        yield replace(policy, ttft_margin=margin)
    # Where KV is ample, degrading is all that lets P-heavy instances share in decoding.
    for watermark in (0.9, *((0.8, 0.7, 0.6, 0.5) if knobs else ())):
        yield replace(policy, watermark=watermark)
    yield replace(policy, alpha=0.85)
    for margin in (0.65, 1.0) if knobs else ():
        yield replace(policy, tpot_margin=margin)
