"""How much of an SLO is left: 1 where nothing of it is used, 0 where it is just kept, negative where missed.

Predicted is what a prompt that came now would get, measured is what the last requests got.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from taichi_serve.instance import Instance
from taichi_serve.latency.predict import Predictor
from taichi_serve.sliders import Kind
from taichi_serve.slo import SLO


@dataclass(frozen=True, slots=True)
class Headroom:
    """Shares of the two SLOs that are left; None where nothing can be said."""

    ttft: float | None = None
    tpot: float | None = None


NOBODY = Headroom()


def typical(prompts: Sequence[int]) -> int | None:
    """The median of these lengths of prompts, in tokens; None of none."""
    return median_low(prompts) if prompts else None


def predicted(
    instances: Iterable[Instance], predictor: Predictor, slo: SLO, prompt_tokens: int | None
) -> dict[str, Headroom]:
    """For each instance, what is left of `slo` at the TTFT of a prompt of `prompt_tokens` that came now, of
    which nothing is cached, and at the TPOT of its decode there.

    An instance that takes no prompts has no TTFT, one that takes no new work neither; without a length of a
    prompt there is nothing to predict.
    """
    found = {}
    for instance in instances:
        ttft = tpot = None
        if prompt_tokens is not None and instance.serving:
            tpot = 1.0 - predictor.tpot(instance, prompt_tokens) / slo.tpot
            if instance.prefills:
                ttft = 1.0 - predictor.ttft(instance, prompt_tokens) / slo.ttft
        found[instance.name] = Headroom(ttft, tpot)
    return found


def best(instances: Iterable[Instance], each: Mapping[str, Headroom]) -> Headroom:
    """The headroom of the cluster: of TTFT that of the best instance, for a prompt can go there; of TPOT that
    of the best one where decodes begin: a D-heavy one, or any where none is D-heavy."""
    serving = [instance for instance in instances if instance.serving]
    decoders = [instance for instance in serving if instance.kind is Kind.D_HEAVY] or serving
    ttfts = [ttft for instance in serving if (ttft := each[instance.name].ttft) is not None]
    tpots = [tpot for instance in decoders if (tpot := each[instance.name].tpot) is not None]
    return Headroom(max(ttfts, default=None), max(tpots, default=None))
