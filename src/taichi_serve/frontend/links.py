"""Our metrics of links between hosts. Where hosts are not told apart there are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from taichi_serve.scheduling.scheduler import GlobalScheduler

LABELS = ["source", "target"]


def links(scheduler: GlobalScheduler) -> Iterator[Metric]:
    """What went over each, what it took, and what the policies make of it."""
    if not (counted := scheduler.links.counted):
        return
    moves = CounterMetricFamily("taichi_link_moves", "Moves between two hosts", labels=LABELS)
    tokens = CounterMetricFamily("taichi_link_moved_tokens", "Tokens of KV moved", labels=LABELS)
    gaps = CounterMetricFamily("taichi_link_gap_seconds", "Sum of their gaps", labels=LABELS)
    refused = CounterMetricFamily("taichi_link_refused", "Moves that did not come about", labels=LABELS)
    price = GaugeMetricFamily("taichi_link_price", "Its price, as a multiple of the mean", labels=LABELS)
    for pair, count in counted.items():
        moves.add_metric(pair, count.moves)
        tokens.add_metric(pair, count.kv_tokens)
        gaps.add_metric(pair, count.gaps)
        refused.add_metric(pair, count.refused)
        price.add_metric(pair, scheduler.links.ratio(pair))
    yield from (moves, tokens, gaps, refused, price)
