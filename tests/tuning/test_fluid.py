"""What sliders carry as if work were a fluid: numbers by hand, and beside what the simulator found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taichi_serve.latency.known import Known
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.shipped import measured
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO
from taichi_serve.tuning.fluid import CHAT, SUMMARIES, Fluid, Load, sliders

# A step takes 10 ms, and 0.1 ms for each token. Of the SLO of 20 ms the mean step may take 18.
LINE = Fluid(Roofline(launch=0.010, token=0.0001), SLO(2.0, 0.020), seqs=10, room=1e9)
LOAD = Load(1000, 100)


def test_an_instance_prefills_in_as_many_steps_as_its_answers_need() -> None:
    # With 6 decodes a step takes 10.6 ms, and 17 with 64 prompt tokens. A prompt of 1,000 has 15.6 such
    # chunks, an answer of 100 tokens 16.7 steps: 0.94 of all steps would need a chunk, and at most 0.8 have
    # one. That makes 51.2 tokens in 15.72 ms on average. With 5 decodes fewer are answered (3.23 requests/s),
    # with 7 the steps are longer.
    assert LINE.carried(Sliders(0, 1, 8192, 64), LOAD) == pytest.approx(51.2 / 0.01572 / 1000)


def test_beside_a_p_heavy_one_few_steps_need_prompts() -> None:
    # A prompt alone takes 110 ms there: 7.27 requests/s. Ten decodes in steps of 11 ms answer 9.09, which is
    # too many: in a share x of the steps are 64 prompt tokens, so that
    # 7.27 + 64 x / 1000 / (0.011 + 0.0064 x) = 10 / 100 / (0.011 + 0.0064 x).
    share = (0.1 - 0.8 / 0.11 * 0.011) / (0.8 / 0.11 * 0.0064 + 0.064)
    assert LINE.carried(Sliders(1, 1, 8192, 64), LOAD) == pytest.approx(0.1 / (0.011 + 0.0064 * share))


def test_answers_are_bounded_by_the_room_for_kv() -> None:
    # 4,200 tokens are the KV of 4 requests with half their answer: 4 decodes in steps of 10.4 ms.
    assert replace(LINE, room=4200).carried(Sliders(1, 1, 8192, 64), LOAD) == pytest.approx(4 / 0.0104 / 100)


def test_prompts_that_only_small_chunks_prefill_may_not_take_longer_than_ttft_allows() -> None:
    # 1,000 tokens are 16 chunks of 64, 17 ms each: 0.27 s.
    assert replace(LINE, slo=SLO(0.25, 0.020)).carried(Sliders(0, 1, 8192, 64), LOAD) == 0.0
    assert replace(LINE, slo=SLO(0.25, 0.020)).carried(Sliders(1, 1, 8192, 64), LOAD) > 0.0


@pytest.mark.parametrize(("ttft", "carries"), [(0.125, True), (0.120, False)])
def test_a_p_heavy_one_is_no_use_where_a_prompt_alone_is_late_there(ttft: float, carries: bool) -> None:
    # A prompt alone takes 110 ms in one step: within 0.9 of 125 ms, not of 120.
    slo = SLO(ttft, 0.020)
    assert (replace(LINE, slo=slo).carried(Sliders(1, 1, 8192, 64), LOAD) > 0.0) is carries


def test_a_step_that_is_too_long_with_one_decode_carries_nothing() -> None:
    assert LINE.carried(Sliders(1, 1, 8192, 112), LOAD) == 0.0  # 21.3 ms
    assert replace(LINE, slo=SLO(2.0, 0.010)).suited(4, 8192) is None


def test_all_chunks_are_looked_at_up_to_the_large_one() -> None:
    chunks = [one.d_chunk for one in sliders(1, 100)]
    assert chunks == [16, 32, 48, 64, 80, 96, 100]
    assert [one.d_chunk for one in sliders(1, 8)] == [8]
    assert {(one.p_heavy, one.d_heavy) for one in sliders(3, 100)} == {(0, 3), (1, 2), (2, 1)}


@given(
    launch=st.floats(0.001, 0.03),
    token=st.floats(1e-6, 5e-4),
    tpot=st.floats(0.01, 0.1),
    instances=st.integers(1, 6),
)
def test_no_other_sliders_are_better_for_the_load_for_which_these_are_worse(
    launch: float, token: float, tpot: float, instances: int
) -> None:
    fluid = Fluid(Roofline(launch=launch, token=token), SLO(2.0, tpot), seqs=64, room=60_000)
    every = list(sliders(instances, 2048))
    best = [max(fluid.carried(one, load) for one in every) for load in (CHAT, SUMMARIES)]
    suited = fluid.suited(instances, 2048)
    if suited is None:
        assert not all(best)
        return

    def worse(one: Sliders) -> float:
        return min(fluid.carried(one, load) / top for load, top in zip((CHAT, SUMMARIES), best, strict=True))

    assert worse(suited) == max(map(worse, every))


@pytest.mark.parametrize(
    ("load", "slo", "split", "found"),
    # What `taichi search` found for four H200 (docs/results.md), in requests/s.
    [(SUMMARIES, SLO(2.0, 0.014), (2, 2), 15.0), (CHAT, SLO(1.0, 0.015), (1, 3), 54.5)],
)
def test_the_best_sliders_and_what_they_carry_are_near_to_what_the_simulator_found(
    load: Load, slo: SLO, split: tuple[int, int], found: float
) -> None:
    steps = Known.of(measured("qwen2.5-14b-tp1-h200-measured"), "measured").truth
    fluid = Fluid(steps, slo, seqs=256, room=112_000)
    best = fluid.suited(4, 8192, (load,))
    assert best is not None
    assert (best.p_heavy, best.d_heavy) == split
    assert 0.8 * found < fluid.carried(best, load) < found
