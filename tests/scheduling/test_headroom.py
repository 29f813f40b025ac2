"""How much of the SLOs is left, by hand: for a prompt that came now on each instance, and on the best."""

from __future__ import annotations

import pytest

from taichi_serve.instance import Instance
from taichi_serve.latency.predict import Average, Learned
from taichi_serve.scheduling.headroom import NOBODY, Headroom, best, predicted, typical
from taichi_serve.sliders import Kind
from taichi_serve.slo import SLO

PROMISED = SLO(ttft=2.0, tpot=0.1)


def learned() -> Learned:
    """1 ms a prompt token, no fixed time; a step takes 50 ms on i0 and 20 ms on i1 and i2."""
    steps = {"i0": Average(0.05, 1.0), "i1": Average(0.02, 1.0), "i2": Average(0.02, 1.0)}
    return Learned(seconds_per_prompt_token=0.001, steps=steps)


def cluster() -> list[Instance]:
    """i0 P-heavy and empty, i1 D-heavy with 1,500 prompt tokens queued, i2 D-heavy that takes no prompts."""
    return [
        Instance("i0", Kind.P_HEAVY, 1024, 100_000),
        Instance("i1", Kind.D_HEAVY, 256, 100_000, queued_tokens=1500),
        Instance("i2", Kind.D_HEAVY, 0, 100_000),
    ]


def test_headroom_is_what_a_typical_prompt_would_leave_of_each_slo() -> None:
    found = predicted(cluster(), learned(), PROMISED, 1000)
    assert found["i0"].ttft == pytest.approx(0.5)  # 1 s of 2 s
    assert found["i0"].tpot == pytest.approx(0.5)  # 50 ms of 100 ms
    assert found["i1"].ttft == pytest.approx(-0.25)  # 2.5 s: it would be late
    assert found["i1"].tpot == pytest.approx(0.8)
    assert found["i2"].ttft is None
    assert found["i2"].tpot == pytest.approx(0.8)


def test_the_clusters_is_that_of_the_best_instance_and_tpot_counts_where_decodes_begin() -> None:
    instances = cluster()
    found = predicted(instances, learned(), PROMISED, 1000)
    assert best(instances, found) == Headroom(found["i0"].ttft, found["i1"].tpot)
    prefill_alone = instances[:1]
    assert best(prefill_alone, found) == found["i0"]  # nobody is D-heavy: it decodes there


def test_who_gets_no_new_work_has_no_headroom() -> None:
    instances = cluster()
    instances[0].draining, instances[1].alive, instances[2].silent = True, False, True
    found = predicted(instances, learned(), PROMISED, 1000)
    assert list(found.values()) == [NOBODY] * 3
    assert best(instances, found) == NOBODY


def test_before_the_first_prompt_nothing_is_predicted() -> None:
    assert typical([]) is None
    assert list(predicted(cluster(), learned(), PROMISED, None).values()) == [NOBODY] * 3
    assert typical([900, 10, 500]) == 500
