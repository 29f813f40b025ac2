"""Rehearsals: who is judged, and who stands best."""

from __future__ import annotations

from taichi_serve.latency.predict import Learned
from taichi_serve.messages import Arrived, Finished, Prefilled
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO
from taichi_serve.tuning.rehearsal import Judge, Standing

PROMISED = SLO(ttft=1.0, tpot=0.1)


def judge(first: int, count: int) -> Judge:
    scheduler = GlobalScheduler(Sliders(0, 1, 0, 256), PROMISED, Learned(), Policy(), {"i0": 100_000})
    return Judge(scheduler, PROMISED, first, count)


def live(judge: Judge, name: str, ttft: float) -> None:
    judge.on(Arrived(0.0, name, 100, 500))
    judge.on(Prefilled(ttft, name, 0, "i0"))
    judge.on(Finished(ttft + 0.5, name, 11))  # ten tokens at 50 ms


def test_the_first_requests_meet_an_empty_cluster_and_are_not_judged() -> None:
    here = judge(first=1, count=3)
    for name, ttft in (("a", 5.0), ("b", 0.5), ("c", 0.4)):
        live(here, name, ttft)
    assert here.standing() == Standing(good=1.0, used=0.5, facts=9)


def test_the_scarcer_slo_is_the_one_that_the_percentile_used_more_of() -> None:
    here = judge(first=0, count=1)
    live(here, "a", 0.2)
    assert round(here.standing().used, 9) == 0.5  # 50 ms of 100, and 0.2 s of 1


def test_a_request_is_judged_by_its_own_slo() -> None:
    here = judge(first=0, count=1)
    here.on(Arrived(0.0, "a", 100, 500, slo=SLO(10.0, 1.0)))
    here.on(Prefilled(5.0, "a", 0, "i0"))
    here.on(Finished(5.5, "a", 11))
    assert here.standing() == Standing(good=1.0, used=0.5, facts=3)


def test_a_rehearsal_is_hopeless_when_a_quarter_is_bad_and_the_rest_counts_as_bad() -> None:
    here = judge(first=0, count=8)
    live(here, "a", 0.5)
    for name in ("b", "c"):
        live(here, name, 2.0)
    assert not here.hopeless
    live(here, "d", 2.0)
    assert here.hopeless
    assert here.standing().good == 1 / 8


def test_who_holds_stands_before_who_fails_gracefully() -> None:
    ranked = [
        Standing(good=0.93, used=0.7),  # holds, and has most left
        Standing(good=0.99, used=0.95),
        Standing(good=0.89, used=1.1),
        Standing(good=0.30, used=0.9),
    ]
    assert sorted(ranked, key=lambda one: one.key, reverse=True) == ranked
