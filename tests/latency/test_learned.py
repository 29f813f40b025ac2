"""The predictor without a profile: what it starts from, and what it learns from whom."""

from __future__ import annotations

import pytest

from taichi_serve.instance import Instance
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import Stepped
from taichi_serve.sliders import Kind


def instance(name: str, chunk: int) -> Instance:
    return Instance(name, Kind.P_HEAVY if chunk > 512 else Kind.D_HEAVY, chunk, kv_capacity=100_000)


def step(name: str, seconds: float, prefill_tokens: int, decodes: int = 1) -> Stepped:
    return Stepped(0.0, name, seconds, prefill_tokens, decodes, kv_tokens=0)


def test_a_step_costs_a_fixed_time_and_a_time_for_each_prompt_token() -> None:
    large, small = instance("i0", 1000), instance("i1", 100)
    learned = Learned()
    for here in (large, small):
        learned.stepped(here, step(here.name, 0.01, 0))
    learned.stepped(small, step("i1", 0.03, 100))  # 10 ms for the step, 0.2 ms for each token
    assert learned.ttft(large, 2000) == pytest.approx(2 * 0.01 + 2000 * 0.0002)
    assert learned.ttft(small, 2000) == pytest.approx(20 * 0.01 + 2000 * 0.0002)


def test_short_prompts_do_not_make_an_instance_look_slow_for_long_ones() -> None:
    large = instance("i0", 1000)
    learned = Learned()
    for _ in range(50):
        learned.stepped(large, step("i0", 0.01, 0))
        learned.stepped(large, step("i0", 0.012, 20))  # 2 ms for 20 tokens; 12 ms is 0.6 ms a token
    assert learned.ttft(large, 1000) == pytest.approx(0.01 + 1000 * 0.0001)


def test_an_instance_without_prompts_is_judged_by_the_speed_of_the_others() -> None:
    large, small = instance("i0", 1000), instance("i1", 100)
    learned = Learned()
    learned.stepped(small, step("i1", 0.01, 100, decodes=0))
    assert learned.ttft(large, 1000) == pytest.approx(0.1)


def test_one_stall_does_not_outweigh_what_was_known() -> None:
    large = instance("i0", 1000)
    learned = Learned()
    for seconds in (0.1, 0.1, 12.0):
        learned.stepped(large, step("i0", seconds, 1000))
    assert learned.ttft(large, 1000) < 0.25
