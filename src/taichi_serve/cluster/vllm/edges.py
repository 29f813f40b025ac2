"""vLLM's histograms of times with the SLOs among their edges: what share kept an SLO can be read off them.

Without that a dashboard interpolates within a bucket, and an SLO of 4 s lies between 2.5 and 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm.v1.metrics.buckets import BucketFamilyKey, histogram_buckets

from taichi_serve.slo import SLO

TTFT: BucketFamilyKey = "time_to_first_token"
TPOT: BucketFamilyKey = "inter_token_latency"  # that of the time per output token, too


def edges(slos: Iterable[SLO], asked: Mapping[str, list[float]] | None) -> dict[str, list[float]]:
    """The edges (seconds) of either histogram, beside what was `asked` for."""
    promised = list(slos)
    found = {TTFT: {slo.ttft for slo in promised}, TPOT: {slo.tpot for slo in promised}}
    more = {family: sorted({*histogram_buckets(family, None, asked), *found[family]}) for family in found}
    return {**(asked or {}), **more}
