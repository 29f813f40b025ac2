"""Our metrics beside vLLM's own, read off the recorder and the ledger when somebody scrapes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from taichi_serve.cluster.vllm.server.supervisor import Standing
from taichi_serve.dashboard.attainment import MINUTE, TEN_MINUTES
from taichi_serve.frontend.links import links
from taichi_serve.frontend.scale import scale
from taichi_serve.messages import Move, Outcome
from taichi_serve.scheduling.counters import UNCLASSED, Attained, PrefixTokens
from taichi_serve.scheduling.headroom import best, predicted, typical

if TYPE_CHECKING:
    from taichi_serve.frontend.record import Recorder
    from taichi_serve.frontend.system import System
    from taichi_serve.latency.accuracy import Accuracy
    from taichi_serve.scheduling.counters import Counters
    from taichi_serve.scheduling.scheduler import GlobalScheduler


class TaichiCollector(Collector):
    """Counters of requests, moves and predictions, gauges of instances. `engine` is vLLM's label: 0 is i0."""

    def __init__(self, system: System) -> None:
        self._system = system

    def collect(self) -> Iterator[Metric]:
        """Everything, now. A part that fails is left out and counted: it takes no other part along."""
        recorder, scheduler = self._system.recorder, self._system.scheduler
        parts: tuple[tuple[Callable[..., Iterable[Metric]], object], ...] = (
            (_requests, recorder),
            (_moves, recorder),
            (links, scheduler),
            (_instances, scheduler),
            (_supervised, self._system),
            (_predictions, scheduler.accuracy),
            (_backflow, scheduler.counters),
            (_attained, self._system),
            (_prefixes, scheduler),
            (_cached, self._system),
            (_tuned, self._system),
            (_sliders, scheduler),
            (_attainment, recorder),
            (_headroom, recorder),
            (_scale, recorder),
            (_front_ends, self._system),
        )
        trouble = recorder.trouble
        for part, of in parts:
            yield from trouble.guarded("metrics", lambda part=part, of=of: list(part(of)))() or ()
        troubles = CounterMetricFamily("taichi_trouble", "Failures beside serving", labels=["what"])
        for what, count in trouble.counts.items():
            troubles.add_metric([what], count)
        yield troubles


def number(name: str) -> str:
    """vLLM's label of an instance."""
    return name.removeprefix("i")


def _requests(recorder: Recorder) -> Iterator[Metric]:
    yield CounterMetricFamily("taichi_requests_accepted", "Requests accepted", recorder.accepted)
    ended = CounterMetricFamily("taichi_requests_ended", "Requests over", labels=["outcome"])
    for outcome in Outcome:
        ended.add_metric([outcome.value], recorder.outcomes[outcome])
    yield ended
    late = recorder.scheduler.counters.best_effort
    yield CounterMetricFamily("taichi_best_effort", "Requests that could no longer meet their TTFT", late)
    bound = CounterMetricFamily("taichi_bound_requests", "Requests bound to one instance", labels=["by"])
    for reason, count in recorder.bound.items():
        bound.add_metric([reason], count)
    yield bound


def _moves(recorder: Recorder) -> Iterator[Metric]:
    moves = CounterMetricFamily("taichi_moves", "Moves completed", labels=["move"])
    for move in Move:
        moves.add_metric([move.value], recorder.moves[move])
    yield moves
    yield CounterMetricFamily("taichi_moved_bytes", "KV bytes moved", recorder.moved_bytes)
    yield CounterMetricFamily("taichi_recomputes", "Legs computed again", recorder.recomputes)


def _instances(scheduler: GlobalScheduler) -> Iterator[Metric]:
    queued = GaugeMetricFamily("taichi_queued_prefill_tokens", "Prompt tokens queued", labels=["engine"])
    chunk = GaugeMetricFamily("taichi_chunk", "Prompt tokens per step", labels=["engine", "kind"])
    alive = GaugeMetricFamily("taichi_alive", "1 while the instance lives", labels=["engine"])
    for instance in scheduler.instances.values():
        queued.add_metric([number(instance.name)], instance.queued_prefill_tokens)
        chunk.add_metric([number(instance.name), instance.kind.value], instance.chunk)
        alive.add_metric([number(instance.name)], float(instance.alive))
    yield from (queued, chunk, alive)


def _supervised(system: System) -> Iterator[Metric]:
    """Who answers, how each instance stands, and how often each was brought back."""
    silent = GaugeMetricFamily("taichi_silent", "1 while the instance does not answer", labels=["engine"])
    standing = GaugeMetricFamily(
        "taichi_standing", "1 for how the instance stands", labels=["engine", "standing"]
    )
    restarts = CounterMetricFamily("taichi_restarts", "Restarts that succeeded", labels=["engine"])
    for engine in system.cluster.engines:
        label, place = number(engine.name), system.keeper.supervisor.places[engine.name]
        silent.add_metric([label], float(engine in system.keeper.silent))
        for name in Standing:
            standing.add_metric([label, name.value], float(name is place.standing))
        restarts.add_metric([label], place.restarts)
    yield from (silent, standing, restarts)
    changes = CounterMetricFamily(
        "taichi_instance_changes", "Instances added, removed, or not started", labels=["change"]
    )
    for change, count in system.elastic.counts.items():
        changes.add_metric([change.value], count)
    yield changes


def _predictions(accuracy: Mapping[str, Accuracy]) -> Iterator[Metric]:
    """Predicted against actual times. Sums, so that whoever reads them chooses the window."""
    labels = ["engine", "of"]
    compared = CounterMetricFamily("taichi_predictions", "Predictions compared", labels=labels)
    predicted = CounterMetricFamily("taichi_predicted_seconds", "Sum of predicted times", labels=labels)
    actual = CounterMetricFamily("taichi_actual_seconds", "Sum of what these times were", labels=labels)
    error = CounterMetricFamily(
        "taichi_prediction_error_seconds", "Sum of |actual - predicted|", labels=labels
    )
    for name, instance in accuracy.items():
        for of, drift in (("ttft", instance.ttft), ("tpot", instance.tpot)):
            compared.add_metric([number(name), of], drift.count)
            predicted.add_metric([number(name), of], drift.predicted)
            actual.add_metric([number(name), of], drift.actual)
            error.add_metric([number(name), of], drift.error)
    yield from (compared, predicted, actual, error)


def _backflow(counters: Counters) -> Iterator[Metric]:
    """How often requests flow back, and what that says about the sliders."""
    yield GaugeMetricFamily("taichi_backflow_rate", "Recent backflows per request", counters.backflow_rate)
    # The rate has no label: one that changes with the value would cut its curve in two.
    reading = GaugeMetricFamily("taichi_backflow_reading", "1 for what the rate says", labels=["reading"])
    reading.add_metric([counters.reading], 1.0)
    yield reading


def _attained(system: System) -> Iterator[Metric]:
    """Requests that met their SLOs and those that did not, by class."""
    kept = CounterMetricFamily(
        "taichi_slo_requests", "Requests judged by their SLOs", labels=["class", "slo", "met"]
    )
    attained = system.scheduler.counters.attained
    for name in dict.fromkeys((UNCLASSED, *system.classes, *attained)):
        of = attained.get(name, Attained())
        for slo, count in (("ttft", of.ttft), ("tpot", of.tpot), ("both", of.both)):
            kept.add_metric([name, slo, "true"], count.met)
            kept.add_metric([name, slo, "false"], count.missed)
    yield kept


def _prefixes(scheduler: GlobalScheduler) -> Iterator[Metric]:
    """Prompt tokens that were believed to be cached where their prompt was placed, and those that were."""
    found = CounterMetricFamily(
        "taichi_prefix_tokens", "Prompt tokens found in prefix caches", labels=["engine", "of"]
    )
    for name in scheduler.instances:
        tokens = scheduler.counters.prefixes.get(name, PrefixTokens())
        found.add_metric([number(name), "predicted"], tokens.predicted)
        found.add_metric([number(name), "actual"], tokens.actual)
    yield found


def _cached(system: System) -> Iterator[Metric]:
    """What the prefix caches hold."""
    blocks = GaugeMetricFamily("taichi_cached_blocks", "Blocks in the prefix cache", labels=["engine"])
    offloaded = GaugeMetricFamily("taichi_host_blocks", "Blocks offloaded to the host", labels=["engine"])
    for engine in system.cluster.engines:
        blocks.add_metric([str(engine.index)], engine.cached_blocks)
        if engine.host_blocks is not None:
            offloaded.add_metric([str(engine.index)], engine.host_blocks)
    yield from (blocks, offloaded)


def _tuned(system: System) -> Iterator[Metric]:
    """What the tuner did, and what it saw at its last look."""
    tuner, scheduler = system.tuner, system.scheduler
    slo = GaugeMetricFamily("taichi_slo_seconds", "What is promised", labels=["of"])
    margin = GaugeMetricFamily("taichi_margin", "Share of the SLO that Algorithm 2 fills up", labels=["of"])
    for of in ("ttft", "tpot"):
        slo.add_metric([of], getattr(scheduler.slo, of))
        margin.add_metric([of], getattr(scheduler.policy, f"{of}_margin"))
    yield from (slo, margin)
    changes = CounterMetricFamily("taichi_tuned", "Changes of sliders, made or suggested", labels=["act"])
    made = [] if tuner is None else [tuner.made, tuner.suggested]
    for act, count in zip(("made", "suggested"), made or (0, 0), strict=True):
        changes.add_metric([act], count)
    yield changes
    if tuner is None or tuner.view is None:
        return
    used = GaugeMetricFamily("taichi_slo_used", "P90 of recent requests, share of the SLO", labels=["of"])
    used.add_metric(["ttft"], tuner.view.ttft)
    used.add_metric(["tpot"], tuner.view.tpot)
    yield used
    yield GaugeMetricFamily("taichi_attainment", "Share of recent requests that were good", tuner.view.good)


def _sliders(scheduler: GlobalScheduler) -> Iterator[Metric]:
    """Where the sliders are."""
    sliders = GaugeMetricFamily("taichi_slider", "Where a slider is", labels=["slider"])
    for name in ("p_heavy", "d_heavy", "p_chunk", "d_chunk"):
        sliders.add_metric([name], getattr(scheduler.sliders, name))
    yield sliders


def _attainment(recorder: Recorder) -> Iterator[Metric]:
    """Shares of the requests that ended lately; of none there is no share."""
    shares = GaugeMetricFamily(
        "taichi_window_attainment", "Share of ended requests within the SLO", labels=["of", "window"]
    )
    now = time.monotonic()
    for window, seconds in (("1m", MINUTE), ("10m", TEN_MINUTES)):
        sums = recorder.attainment.window(now, seconds)
        for of, name in (("both", "good"), ("ttft", "ttft"), ("tpot", "tpot")):
            if (share := sums.share(name)) is not None:
                shares.add_metric([of, window], share)
    yield shares


def _headroom(recorder: Recorder) -> Iterator[Metric]:
    """What is left of the SLOs: for a prompt that came now, and of what the last requests got."""
    each = GaugeMetricFamily(
        "taichi_instance_headroom", "Share of an SLO left for a prompt that came now", labels=["engine", "of"]
    )
    whole = GaugeMetricFamily("taichi_headroom", "Share of an SLO that is left", labels=["of", "seen"])
    scheduler, now = recorder.scheduler, time.monotonic()
    instances = scheduler.instances.values()
    found = predicted(instances, scheduler.predictor, scheduler.slo, typical(recorder.prompts))
    told = [("predicted", best(instances, found)), ("measured", recorder.attainment.headroom(now, MINUTE))]
    for of in ("ttft", "tpot"):
        for name in scheduler.instances:
            if (share := getattr(found[name], of)) is not None:
                each.add_metric([number(name), of], share)
        for seen, headroom in told:
            if (share := getattr(headroom, of)) is not None:
                whole.add_metric([of, seen], share)
    yield from (each, whole)


def _scale(recorder: Recorder) -> Iterator[Metric]:
    """How many instances the last minutes asked for: what an autoscaler needs."""
    wanted = GaugeMetricFamily(
        "taichi_scale_wanted_instances",
        "Instances that the load of the last minutes asks for",
        labels=["kind"],
    )
    for kind, one in scale(recorder, time.monotonic()).items():
        wanted.add_metric([kind.value], one.wanted)
    yield wanted


def _front_ends(system: System) -> Iterator[Metric]:
    """The processes that speak HTTP, where there are several."""
    if not (processes := system.front.processes()):
        return
    labels = ["front_end"]
    serves = GaugeMetricFamily("taichi_front_end_serves", "1 while it accepts connections", labels=labels)
    requests = GaugeMetricFamily("taichi_front_end_requests", "Its open requests", labels=labels)
    restarts = CounterMetricFamily("taichi_front_end_restarts", "Restarts that succeeded", labels=labels)
    for one in processes:
        serves.add_metric([one["name"]], float(one["serves"]))
        requests.add_metric([one["name"]], one["requests"])
        restarts.add_metric([one["name"]], one["restarts"])
    yield from (serves, requests, restarts)


@contextlib.contextmanager
def exported(system: System) -> Iterator[None]:
    """Have /metrics show ours while the server runs."""
    collector = TaichiCollector(system)
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)
