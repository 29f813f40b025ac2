"""A server in miniature for a scrape to look at, and what the scrape shows of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from taichi_serve.cluster.vllm.server.elastic import Change
from taichi_serve.cluster.vllm.server.supervisor import Supervisor
from taichi_serve.frontend.metrics import TaichiCollector
from taichi_serve.frontend.record import Recorder
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import Arrived, Finished, Flowed, Placed, Prefilled
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO


@dataclass(frozen=True)
class Engine:
    """What a scrape asks of an engine."""

    index: int
    name: str
    cached_blocks: int
    host_blocks: int | None


def system() -> Any:
    """Over i0 P-heavy and i1 D-heavy, before the first request."""
    scheduler = GlobalScheduler(
        Sliders(1, 1, 1024, 256), SLO(4.0, 0.07), Learned(), Policy(), {"i0": 100_000, "i1": 100_000}
    )
    engines = [
        Engine(index=0, name="i0", cached_blocks=3, host_blocks=9),
        Engine(index=1, name="i1", cached_blocks=0, host_blocks=None),
    ]
    cluster = SimpleNamespace(engines=engines)
    recorder = Recorder(scheduler, 2048)
    keeper = SimpleNamespace(silent=set(), supervisor=Supervisor(("i0", "i1"), restarts=1))
    front = SimpleNamespace(processes=list)
    elastic = SimpleNamespace(counts=dict.fromkeys(Change, 0))
    parts = {
        "cluster": cluster,
        "keeper": keeper,
        "elastic": elastic,
        "front": front,
        "tuner": None,
        "classes": {},
    }
    return SimpleNamespace(scheduler=scheduler, recorder=recorder, **parts)


def scraped(system: Any, name: str) -> dict[tuple[str, ...], float]:
    """The samples of one name by their labels' values."""
    samples = [s for metric in TaichiCollector(system).collect() for s in metric.samples if s.name == name]
    return {tuple(s.labels.values()): s.value for s in samples}


def with_everything() -> Any:
    """The same with a request that ended, one that was bound, a tuner that has looked, one of
    several front ends, and two hosts: every metric."""
    here, now = system(), time.monotonic()
    for event in (Arrived(now - 2, "a", 100, 50), Prefilled(now - 1, "a", 0, "i1"), Finished(now, "a", 11)):
        here.recorder.attainment.on(event)
    here.recorder.bound["an image"] += 1
    for name, host in (("i0", "10.0.0.1"), ("i1", "10.0.0.2")):
        here.scheduler.on(Placed(now, name, host))
    one, other = here.scheduler.instances.values()
    here.scheduler.links.flowed(one, other, Flowed(now, "a", 1, "i1", 11, 100, 0.01))
    here.recorder.prompts.append(100)
    here.tuner = SimpleNamespace(made=1, suggested=0, view=SimpleNamespace(ttft=0.5, tpot=0.9, good=0.95))
    here.front.processes = lambda: [{"name": "f0", "serves": True, "requests": 3, "restarts": 1}]
    return here
