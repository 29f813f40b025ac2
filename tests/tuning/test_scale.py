"""How many instances the last minutes asked for, by hand."""

from __future__ import annotations

import pytest

from taichi_serve.instance import Instance
from taichi_serve.messages import Stepped
from taichi_serve.sliders import Kind
from taichi_serve.tuning.scale import Judged, Load, Use, wanted

P, D = Kind.P_HEAVY, Kind.D_HEAVY
NOBODY = Judged(0)
CALM = Judged(100, 0.99, 1.0, 0.99)


def counts(there: dict[Kind, int], p: Use, d: Use, judged: Judged = CALM) -> tuple[int, int]:
    found = wanted(there, {P: p, D: d}, judged)
    return found[P].wanted, found[D].wanted


@pytest.mark.parametrize(
    ("used", "of", "then"),
    [
        (0.75, 1, 1),  # just what should be used at most
        (0.76, 1, 2),
        (0.9, 4, 5),  # 3.6 instances' worth, of which each has 0.75: 4.8
        (0.75, 4, 4),
        (0.61, 4, 4),  # three would have 0.81
        (0.45, 4, 3),  # three would have 0.6
        (0.46, 4, 4),
        (0.0, 4, 3),  # one at a time
        (0.0, 1, 1),  # the last of a kind stays
        (3.0, 2, 4),  # at most twice as many
        (0.3, 2, 1),
        (0.31, 2, 2),
    ],
)
def test_so_many_are_wanted_that_three_quarters_would_be_used(used: float, of: int, then: int) -> None:
    assert counts({P: of, D: 1}, Use(prompts=used), Use(memory=0.5)) == (then, 1)
    assert counts({P: 1, D: of}, Use(prompts=0.5), Use(memory=used)) == (1, then)
    assert counts({P: 1, D: of}, Use(prompts=0.5), Use(pace=used)) == (1, then)


def test_the_scarcest_of_the_three_counts_and_is_named() -> None:
    found = wanted({P: 0, D: 2}, {P: Use(), D: Use(prompts=0.3, memory=0.9, pace=0.8)}, CALM)[D]
    assert (found.now, found.wanted) == (2, 3)
    assert found.why == "memory 90% used, and at most 75% should be"


def test_late_first_tokens_ask_for_a_p_heavy_one_and_late_tokens_for_a_d_heavy_one() -> None:
    half = Use(prompts=0.5)
    assert counts({P: 2, D: 2}, half, half, Judged(50, 0.8, 0.8, 0.99)) == (3, 2)
    assert counts({P: 2, D: 2}, half, half, Judged(50, 0.8, 0.99, 0.8)) == (2, 3)
    assert counts({P: 0, D: 2}, Use(), half, Judged(50, 0.8, 0.8, 0.99)) == (0, 3)  # D-heavy ones prefill
    assert counts({P: 2, D: 0}, half, Use(), Judged(50, 0.8, 0.99, 0.8)) == (3, 0)


def test_a_few_late_requests_say_nothing() -> None:
    assert counts({P: 1, D: 1}, Use(0.5), Use(0.5), Judged(19, 0.0, 0.0, 0.0)) == (1, 1)


def test_an_slo_that_an_idle_server_misses_asks_for_nobody_and_lets_nobody_go() -> None:
    assert counts({P: 2, D: 2}, Use(0.05), Use(0.05), Judged(50, 0.0, 0.0, 1.0)) == (2, 2)


def test_nothing_happened_and_one_of_each_kind_is_enough() -> None:
    assert counts({P: 2, D: 3}, Use(), Use(), NOBODY) == (1, 2)


def instance(kind: Kind, kv_tokens: int = 0) -> Instance:
    return Instance("i0", kind, 256, 1_000, kv_tokens=kv_tokens)


def test_time_in_steps_with_prompts_is_a_share_of_the_time_of_all_of_the_kind() -> None:
    load = Load()
    load.begin(0.0)
    for at in range(1, 101):  # half a second in each second, on one of two
        load.stepped(instance(P), Stepped(float(at), "i0", 0.5, 256, 0, 0), 0.05, 0.9)
    use = load.use(100.0, {P: 2, D: 1})
    assert use[P].prompts == pytest.approx(0.25)
    assert use[D] == Use()


def test_memory_counts_up_to_the_watermark_for_as_long_as_it_was_in_use() -> None:
    load = Load()
    load.begin(0.0)
    for at in range(1, 101):  # 450 of 1,000 tokens, half of the time
        load.stepped(instance(D, 450), Stepped(float(at), "i0", 0.5, 0, 4, 450), 1.0, 0.9)
    assert load.use(100.0, {D: 1})[D].memory == pytest.approx(0.25)


def test_pace_is_the_share_of_the_slo_that_steps_without_prompts_take() -> None:
    load = Load()
    load.begin(0.0)
    for step in range(1, 1001):  # 40 ms of 50, all the time
        load.stepped(instance(D), Stepped(step * 0.04, "i0", 0.04, 0, 8, 0), 0.05, 0.9)
    assert load.use(40.0, {D: 1})[D].pace == pytest.approx(0.8)


def test_what_is_longer_ago_than_the_window_is_forgotten() -> None:
    load = Load()
    load.begin(0.0)
    for at in range(1, 101):
        load.stepped(instance(P), Stepped(float(at), "i0", 1.0, 256, 0, 0), 0.05, 0.9)
    assert load.use(100.0, {P: 1})[P].prompts == pytest.approx(1.0)
    assert load.use(1_000.0, {P: 1})[P].prompts == 0.0
    assert load.seconds(1_000.0) == 300.0


def test_counting_begins_anew_with_other_instances() -> None:
    load = Load()
    load.stepped(instance(P), Stepped(1.0, "i0", 1.0, 256, 0, 0), 0.05, 0.9)
    load.begin(50.0)
    assert load.seconds(60.0) == 10.0
    assert load.use(60.0, {P: 1})[P] == Use()
