"""What a server says of sliders that set themselves: in its state and in its metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("prometheus_client")  # it comes with vLLM

from taichi_serve.frontend.metrics import TaichiCollector
from taichi_serve.frontend.record import Recorder
from taichi_serve.frontend.state import SHOWN, _autotune
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import Arrived, Finished, Prefilled, Promised, Stepped, Tuned
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO
from taichi_serve.tuning.rehearsal import Limits
from taichi_serve.tuning.tuner import Tuner


def system(act: bool = True) -> Any:
    """A server that has seen 40 requests with a TPOT of 60 ms where 50 are promised."""
    capacities = {"i0": 100_000, "i1": 100_000}
    scheduler = GlobalScheduler(Sliders(1, 1, 1024, 256), SLO(1.0, 0.05), Learned(), Policy(), capacities)
    recorder = Recorder(scheduler, 2048)
    tuner = Tuner(recorder, scheduler, Limits(100_000, 256, 8192, 2048, 16, 1000), None, act)
    for number in range(40):
        at, name = number * 0.5, f"r{number}"
        tuner.on(Arrived(at, name, 100, 500))
        tuner.on(Prefilled(at + 0.2, name, 0, "i1"))
        tuner.on(Stepped(at + 0.2, "i1", 0.06, 64, 4, 1000))
        tuner.on(Finished(at + 1.4, name, 21))
    cluster = SimpleNamespace(engines=[])
    adviser = SimpleNamespace(seconds=1.5)
    return SimpleNamespace(
        classes={},
        scheduler=scheduler,
        recorder=recorder,
        cluster=cluster,
        front=SimpleNamespace(processes=list),
        elastic=SimpleNamespace(counts={}),
        tuner=tuner,
        adviser=adviser,
    )


def scraped(of: Any, name: str) -> dict[tuple[str, ...], float]:
    samples = [s for metric in TaichiCollector(of).collect() for s in metric.samples if s.name == name]
    return {tuple(s.labels.values()): s.value for s in samples}


@pytest.mark.parametrize(("act", "made", "suggested"), [(True, 1.0, 0.0), (False, 0.0, 1.0)])
def test_changes_that_were_made_and_suggested_are_counted_apart(
    act: bool, made: float, suggested: float
) -> None:
    here = system(act)
    assert scraped(here, "taichi_tuned_total") == {("made",): made, ("suggested",): suggested}
    assert [type(change) for change in here.recorder.tuned] == [Tuned]


def test_the_metrics_say_what_is_promised_and_how_much_of_it_is_used() -> None:
    here = system()
    assert scraped(here, "taichi_slo_seconds") == {("ttft",): 1.0, ("tpot",): 0.05}
    assert scraped(here, "taichi_margin") == {("ttft",): 0.5, ("tpot",): 0.8}
    used = scraped(here, "taichi_slo_used")
    assert round(used[("ttft",)], 6) == 0.2
    here.tuner.on(Promised(30.0, SLO(2.0, 0.07)))
    assert scraped(here, "taichi_slo_seconds") == {("ttft",): 2.0, ("tpot",): 0.07}
    assert scraped(here, "taichi_trouble_total")[("metrics",)] == 0.0


def test_the_state_has_the_last_view_and_every_change_with_its_reason() -> None:
    told = _autotune(system())
    assert (told["mode"], told["rehearsing_seconds"], told["proposal"]) == ("on", 1.5, None)
    assert [change["sliders"]["d_chunk"] for change in told["changes"]] == [192]
    assert told["changes"][0]["why"].startswith("S_D 256 -> 192: TPOT is short")
    assert told["view"]["slow"] == 1.0
    assert len(told["changes"]) <= SHOWN


def test_without_a_tuner_the_state_says_that_it_is_off() -> None:
    here = system()
    here.tuner = None
    assert _autotune(here) == {"mode": "off"}
    assert scraped(here, "taichi_tuned_total") == {("made",): 0.0, ("suggested",): 0.0}
    assert scraped(here, "taichi_slo_used") == {}
