"""Our metrics beside vLLM's own, read off the recorder and the ledger when somebody scrapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from taichi_serve.messages import Move, Outcome

if TYPE_CHECKING:
    from taichi_serve.frontend.server import System


class TaichiCollector(Collector):
    """Counters of requests and moves, gauges of instances. `engine` is vLLM's label: 0 is i0."""

    def __init__(self, system: System) -> None:
        self._system = system

    def collect(self) -> Iterator[Metric]:
        """Everything, now."""
        recorder, scheduler = self._system.recorder, self._system.scheduler
        yield CounterMetricFamily("taichi_requests_accepted", "Requests accepted", recorder.accepted)
        ended = CounterMetricFamily("taichi_requests_ended", "Requests over", labels=["outcome"])
        for outcome in Outcome:
            ended.add_metric([outcome.value], recorder.outcomes[outcome])
        yield ended
        moves = CounterMetricFamily("taichi_moves", "Moves completed", labels=["move"])
        for move in Move:
            moves.add_metric([move.value], recorder.moves[move])
        yield moves
        yield CounterMetricFamily("taichi_moved_bytes", "KV bytes moved", recorder.moved_bytes)
        yield CounterMetricFamily("taichi_recomputes", "Legs computed again", recorder.recomputes)
        bound = CounterMetricFamily("taichi_bound_requests", "Requests bound to one instance", labels=["by"])
        for reason, count in recorder.bound.items():
            bound.add_metric([reason], count)
        yield bound
        queued = GaugeMetricFamily("taichi_queued_prefill_tokens", "Prompt tokens queued", labels=["engine"])
        chunk = GaugeMetricFamily("taichi_chunk", "Prompt tokens per step", labels=["engine", "kind"])
        alive = GaugeMetricFamily("taichi_alive", "1 while the instance lives", labels=["engine"])
        for number, instance in enumerate(scheduler.instances.values()):
            queued.add_metric([str(number)], instance.queued_prefill_tokens)
            chunk.add_metric([str(number), instance.kind.value], instance.chunk)
            alive.add_metric([str(number)], float(instance.alive))
        yield from (queued, chunk, alive)


@contextlib.contextmanager
def exported(system: System) -> Iterator[None]:
    """Have /metrics show ours while the server runs."""
    collector = TaichiCollector(system)
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)
