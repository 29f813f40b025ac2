"""What a scrape shows: how well each instance was predicted, and what the backflow rate says."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("prometheus_client")  # it comes with vLLM

from scraping import scraped, system

from taichi_serve.frontend.state import headroom
from taichi_serve.messages import Arrived, Finished, Outcome, Prefilled


def test_predicted_and_actual_times_are_summed_for_each_instance() -> None:
    here = system()
    here.scheduler.accuracy["i0"].ttft.add(predicted=1.0, actual=1.5)
    here.scheduler.accuracy["i0"].ttft.add(predicted=2.0, actual=1.75)
    here.scheduler.accuracy["i1"].tpot.add(predicted=0.05, actual=0.0625)
    key = ("0", "ttft")
    assert scraped(here, "taichi_predictions_total")[key] == 2
    assert scraped(here, "taichi_predicted_seconds_total")[key] == 3.0
    assert scraped(here, "taichi_actual_seconds_total")[key] == 3.25
    assert scraped(here, "taichi_prediction_error_seconds_total")[key] == 0.75
    assert scraped(here, "taichi_actual_seconds_total")["1", "tpot"] == 0.0625


def test_what_was_never_compared_is_there_with_zero() -> None:
    # A counter that appears only with its first value has no rate until the second.
    assert scraped(system(), "taichi_predictions_total") == {
        (engine, of): 0.0 for engine in "01" for of in ("ttft", "tpot")
    }


def test_backflow_rate_comes_with_its_reading() -> None:
    here = system()
    assert scraped(here, "taichi_backflow_rate") == {(): 0.0}
    assert scraped(here, "taichi_backflow_reading") == {("ok",): 1.0}
    here.scheduler.counters.ended(Outcome.FINISHED, backflows=1)
    assert scraped(here, "taichi_backflow_rate") == {(): 1.0}
    (reading,) = scraped(here, "taichi_backflow_reading")
    assert reading[0].startswith("too few D-heavy instances")


def test_tokens_of_prefixes_are_summed_as_predicted_and_as_they_were() -> None:
    here = system()
    here.scheduler.counters.through("i1", prompt_tokens=200, predicted=160, actual=144)
    assert scraped(here, "taichi_prefix_tokens_total") == {
        ("0", "predicted"): 0,
        ("0", "actual"): 0,
        ("1", "predicted"): 160,
        ("1", "actual"): 144,
    }


def test_blocks_of_the_prefix_caches_are_shown_for_each_instance() -> None:
    assert scraped(system(), "taichi_cached_blocks") == {("0",): 3, ("1",): 0}
    assert scraped(system(), "taichi_host_blocks") == {("0",): 9}


def test_sliders_are_gauges() -> None:
    assert scraped(system(), "taichi_slider") == {
        ("p_heavy",): 1,
        ("d_heavy",): 1,
        ("p_chunk",): 1024,
        ("d_chunk",): 256,
    }


def test_attainment_of_the_last_minutes_is_there_once_a_request_ended() -> None:
    here = system()
    assert scraped(here, "taichi_window_attainment") == {}
    now = time.monotonic()
    for event in (
        Arrived(now - 5.0, "a", 100, 50),
        Prefilled(now - 4.0, "a", 0, "i1"),  # TTFT 1 s of 4 s
        Finished(now, "a", 11),  # TPOT 400 ms of 70 ms
    ):
        here.recorder.attainment.on(event)
    shares = {("both", 0.0), ("ttft", 1.0), ("tpot", 0.0)}
    assert scraped(here, "taichi_window_attainment") == {
        (of, window): share for of, share in shares for window in ("1m", "10m")
    }


def test_headroom_is_there_for_each_instance_once_a_prompt_came() -> None:
    here = system()
    assert scraped(here, "taichi_headroom") == scraped(here, "taichi_instance_headroom") == {}
    here.recorder.prompts.extend((50, 100, 8000))
    # 100 tokens of 0.5 ms are 50 ms of 4 s; a step of 20 ms is that of 70 ms.
    ttft, tpot = pytest.approx(1 - 0.05 / 4), pytest.approx(1 - 0.02 / 0.07)
    assert scraped(here, "taichi_instance_headroom") == {
        ("0", "ttft"): ttft,
        ("0", "tpot"): tpot,
        ("1", "ttft"): ttft,
        ("1", "tpot"): tpot,
    }
    assert scraped(here, "taichi_headroom") == {("ttft", "predicted"): ttft, ("tpot", "predicted"): tpot}
    here.scheduler.instances["i1"].draining = True
    assert set(scraped(here, "taichi_instance_headroom")) == {("0", "ttft"), ("0", "tpot")}


def test_measured_headroom_is_in_a_scrape_and_in_the_state() -> None:
    here, now = system(), time.monotonic()
    for event in (
        Arrived(now - 5.0, "a", 100, 50),
        Prefilled(now - 4.0, "a", 0, "i1"),
        Finished(now, "a", 101),
    ):
        here.recorder.attainment.on(event)  # TTFT 1 s of 4 s, TPOT 40 ms of 70 ms
    ttft, tpot = pytest.approx(0.75), pytest.approx(1 - 0.04 / 0.07)
    assert scraped(here, "taichi_headroom") == {("ttft", "measured"): ttft, ("tpot", "measured"): tpot}
    nothing = {"ttft": None, "tpot": None}
    assert headroom(here.recorder, now) == {
        "prompt_tokens": None,
        "predicted": nothing,
        "measured": {"ttft": ttft, "tpot": tpot},
        "instances": {"i0": nothing, "i1": nothing},
    }


def test_an_instance_that_is_lost_waits_starts_and_is_counted_when_it_is_back() -> None:
    here = system()
    supervisor = here.keeper.supervisor
    others = {("0", name): float(name == "up") for name in ("up", "waiting", "starting", "out")}

    def standing() -> set[str]:
        found = scraped(here, "taichi_standing")
        assert others.items() <= found.items()
        return {name for (engine, name), value in found.items() if engine == "1" and value == 1.0}

    assert standing() == {"up"}
    supervisor.lost("i1", "killed", 10.0)
    assert standing() == {"waiting"}
    supervisor.starting("i1", 10.0)
    assert standing() == {"starting"}
    assert scraped(here, "taichi_restarts_total") == {("0",): 0, ("1",): 0}
    supervisor.back("i1", 34.0)
    assert standing() == {"up"}
    assert scraped(here, "taichi_restarts_total") == {("0",): 0, ("1",): 1}
    supervisor.lost("i1", "killed", 40.0)  # one restart an hour is all it may have
    assert standing() == {"out"}


def test_whoever_does_not_answer_is_silent() -> None:
    here = system()
    assert scraped(here, "taichi_silent") == {("0",): 0.0, ("1",): 0.0}
    here.keeper.silent.add(here.cluster.engines[1])
    assert scraped(here, "taichi_silent") == {("0",): 0.0, ("1",): 1.0}


def test_no_part_of_a_scrape_fails_here() -> None:
    here = system()
    assert scraped(here, "taichi_trouble_total")[("metrics",)] == 0.0
