"""Predictions from a profile by hand-made numbers, and how a wrong profile heals."""

from __future__ import annotations

import pytest

from taichi_serve.instance import Instance
from taichi_serve.latency.accuracy import Drift
from taichi_serve.latency.model import Roofline, prompt_attention
from taichi_serve.latency.predict import Learned
from taichi_serve.latency.profile import Transfer
from taichi_serve.latency.profiled import Profiled
from taichi_serve.messages import Flowed, Stepped
from taichi_serve.sliders import Kind

# 10 ms a step, 0.1 ms a prompt or output token; no attention, so that the numbers stay small.
PLAIN = Roofline(launch=0.01, token=1e-4)
LINK = {(Kind.P_HEAVY, Kind.D_HEAVY): Transfer(Kind.P_HEAVY, Kind.D_HEAVY, 0.02, 1e6)}


def d_heavy(**figures: int) -> Instance:
    return Instance("i1", Kind.D_HEAVY, 256, 100_000, **figures)


def test_ttft_of_an_idle_instance_is_its_own_chunks() -> None:
    # 600 tokens in chunks of 256, 256 and 88: 3 x 10 ms + 600 x 0.1 ms = 90 ms.
    assert Profiled(PLAIN, {}, 100).ttft(d_heavy(), 600) == pytest.approx(0.090)


def test_ttft_counts_the_queue_the_decodes_beside_it_and_half_of_the_running_step() -> None:
    # The running step has 256 of the 400 tokens in it: half of 10 + 1 + 25.6 ms = 18.3 ms. The other 144 and
    # 600 are 3 steps beside 10 decodes: 33 ms and 744 x 0.1 ms.
    instance = d_heavy(queued_tokens=400, running_tokens=256, queued_requests=1, decodes=10)
    assert Profiled(PLAIN, {}, 100).ttft(instance, 600) == pytest.approx(0.0183 + 0.1074)


def test_last_step_of_a_queue_is_as_full_as_steps_were_lately() -> None:
    predictor = Profiled(PLAIN, {}, 100)
    instance = d_heavy(queued_tokens=256, running_tokens=256, queued_requests=1)
    # Half of 35.6 ms, and a step with the 56 own tokens: 10 + 5.6 ms. Others will share it: 10 + 20 ms.
    assert predictor.ttft(instance, 56) == pytest.approx(0.0178 + 0.0156)
    predictor.stepped(instance, Stepped(0.0, "i1", 0.03, 200, 0, 0))
    assert predictor.ttft(instance, 56) == pytest.approx(0.0178 + 0.03)
    assert predictor.ttft(d_heavy(), 56) == pytest.approx(0.0156)  # idle: the step begins at once


def test_ttft_adds_the_attention_of_the_own_prompt_and_of_what_is_left_of_the_queue() -> None:
    model = Roofline(launch=0.0, token=0.0, attention=1e-6)
    instance = d_heavy(queued_tokens=400, progress_tokens=200, queued_attention=prompt_attention(400))
    # Half of 80,200 pairs of the queue and 180,300 own ones, at 1 us; half a step without attention is 0.
    assert Profiled(model, {}, 100).ttft(instance, 600) == pytest.approx(0.0401 + 0.1803)


def test_tpot_of_a_decode_that_joins_counts_it_and_its_context() -> None:
    model = Roofline(launch=0.01, decode=1e-3, kv=1e-6)
    instance = d_heavy(decodes=4, context_base=4000)
    # 10 ms + 5 x 1 ms + (4000 + 1000) x 1 us = 20 ms; as it is now 10 + 4 + 4 = 18 ms.
    assert Profiled(model, {}, 100).tpot(instance, 1000) == pytest.approx(0.020)
    assert Profiled(model, {}, 100).tpot(instance, 0) == pytest.approx(0.018)


def test_tpot_mixes_steps_with_and_without_prompts_as_they_were_seen() -> None:
    predictor, instance = Profiled(PLAIN, {}, 100), d_heavy(decodes=0)
    for prompt in (256, 0) * 100:
        seconds = PLAIN.of(prompt, 0, 10, 0)
        predictor.stepped(instance, Stepped(0.0, "i1", seconds, prompt, 10, 0))
    # Half of the steps 10 ms, half 35.6 ms (no decodes now); the last step weighs a little more: 2 %.
    assert predictor.tpot(instance, 0) == pytest.approx((0.010 + 0.0356) / 2, rel=0.03)


def test_move_is_the_link_and_one_step_or_computing_again_where_that_is_faster() -> None:
    source, target = Instance("i0", Kind.P_HEAVY, 1024, 100_000), d_heavy()
    predictor = Profiled(PLAIN, LINK, 100)
    # 200 tokens x 100 B / 1 MB/s + 20 ms = 40 ms; again: one step of 10 + 25.6 ms; then one step with
    # it there.
    step = predictor.tpot(target, 200)
    assert predictor.move(source, target, 200) == pytest.approx(0.0356 + step)
    target.chunk = 0  # nothing is computed again where no prompt may be computed
    assert predictor.move(source, target, 200) == pytest.approx(0.040 + step)
    assert predictor.move(source, source, 200) == 0.0


def test_wrong_profile_heals_within_fifty_steps() -> None:
    predictor, instance = Profiled(PLAIN, {}, 100), d_heavy()
    assert predictor.ttft(instance, 256) == pytest.approx(0.0356)
    for _ in range(50):  # the machine is twice as slow as the profile says
        predictor.stepped(instance, Stepped(0.0, "i1", 2 * 0.0356, 256, 0, 0))
    assert predictor.ttft(instance, 256) == pytest.approx(2 * 0.0356, rel=0.01)


def test_bias_is_bounded_and_forgets_a_stall() -> None:
    predictor, instance = Profiled(PLAIN, {}, 100), d_heavy()
    predictor.stepped(instance, Stepped(0.0, "i1", 60.0, 256, 0, 0))  # a minute for one step
    assert predictor.ttft(instance, 256) == pytest.approx(4 * 0.0356)
    for _ in range(80):
        predictor.stepped(instance, Stepped(0.0, "i1", 0.0356, 256, 0, 0))
    assert predictor.ttft(instance, 256) == pytest.approx(0.0356, rel=0.05)


def test_gap_of_moves_is_learned_by_pair_of_kinds() -> None:
    source, target = Instance("i0", Kind.P_HEAVY, 1024, 100_000), d_heavy()
    target.chunk = 0
    predictor = Profiled(Roofline(launch=0.0), LINK, 100)
    for _ in range(50):  # 200 tokens took 80 ms and not 40
        predictor.flowed(source, target, Flowed(0.0, "a", 1, "i1", 2, 200, 0.08))
    assert predictor.move(source, target, 200) == pytest.approx(0.08)


def test_without_a_profile_speed_and_tpot_are_learned_from_steps() -> None:
    predictor, instance = Learned(seconds_per_prompt_token=0.001, seconds_per_step=0.05), d_heavy()
    assert predictor.ttft(instance, 1000) == pytest.approx(1.0)
    assert predictor.tpot(instance, 0) == pytest.approx(0.05)
    predictor.stepped(instance, Stepped(0.0, "i1", 0.02, 200, 1, 0))
    assert predictor.ttft(instance, 1000) == pytest.approx(0.1)  # 0.1 ms a token
    assert predictor.tpot(instance, 0) == pytest.approx(0.02)


def test_drift_says_how_far_predictions_were_off() -> None:
    drift = Drift()
    assert drift.ratio == 1.0
    drift.add(predicted=1.0, actual=2.0)
    drift.add(predicted=3.0, actual=2.0)
    assert (drift.count, drift.ratio, drift.relative_error) == (2, 1.0, 0.5)


def test_what_a_prompt_adds_to_a_queue_is_its_share_of_full_chunks_and_its_attention() -> None:
    # A step of 1000 prompt tokens takes 1 ms, 2 ms for having some, and 0.1 ms a token: 103 ms.
    model = Roofline(launch=0.001, mixed=0.002, token=1e-4, attention=1e-8)
    here = Instance("i0", Kind.P_HEAVY, 1000, 100_000)
    pairs = (2500 * 2501 - 500 * 501) / 2
    assert Profiled(model, {}, 1).work(here, 2500, 500) == pytest.approx(2 * 0.103 + 1e-8 * pairs)


def test_a_step_that_has_just_begun_has_all_of_itself_left_and_an_old_one_nothing() -> None:
    # A step of 1000 prompt tokens takes 0.1 s, of which a prediction counts half.
    here = Instance("i0", Kind.P_HEAVY, 1000, 100_000, running_tokens=1000, queued_tokens=1000)
    predictor = Profiled(Roofline(launch=0.0, token=1e-4), {}, 1)
    assert [predictor.since(here, elapsed) for elapsed in (0.0, 0.05, 0.3)] == pytest.approx(
        [0.05, 0.0, -0.05]
    )
    assert predictor.since(Instance("i1", Kind.P_HEAVY, 1000, 100_000), 1.0) == 0.0


def test_without_a_profile_the_running_step_counts_as_queued_and_what_is_over_of_it_is_taken_off() -> None:
    here = Instance("i0", Kind.P_HEAVY, 1000, 100_000, running_tokens=1000, queued_tokens=1000)
    learned = Learned(seconds_per_prompt_token=1e-4)
    assert [learned.since(here, elapsed) for elapsed in (0.0, 0.05, 0.3)] == pytest.approx([0.0, -0.05, -0.1])
    assert learned.work(here, 2500, 500) == pytest.approx(0.2)
