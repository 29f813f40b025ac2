"""The slow loop: the setting that would have served the last requests best."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from taichi_serve.cluster.simulated import Call
from taichi_serve.latency.fit import Sample
from taichi_serve.latency.model import Batch, Roofline
from taichi_serve.latency.profile import Transfer
from taichi_serve.scheduling.policy import Policy
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO
from taichi_serve.tuning import proposal
from taichi_serve.tuning.proposal import Question, far, near, propose
from taichi_serve.tuning.rehearsal import Limits, Past, Plant, rehearse
from taichi_serve.tuning.setting import Setting

# A step takes 10 ms, a prompt token 0.1 ms, whatever else is in it.
MODEL = Roofline(launch=0.01, token=1e-4)
LINKS = tuple(Transfer(a, b, 0.005, 1e10) for a in Kind for b in Kind)
PLANT = Plant(MODEL, (), 1.0, 1.0, 1.0, Limits(100_000, 64, 8192, 2048, 16, 1000), LINKS)
LONG = Past(tuple(Call(n * 0.25, 2000, 50) for n in range(60)), 15.0)
NOW = Setting(Sliders(1, 1, 2048, 1024), 0.5, 10.0)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearsals of a few requests."""
    monkeypatch.setattr(proposal, "FEWEST", 60)
    monkeypatch.setattr(proposal, "MOST", 60)


def question(tpot: float, now: Setting = NOW) -> Question:
    return Question(PLANT, LONG, SLO(4.0, tpot), Policy(), now, 2.0)


def test_a_chunk_whose_steps_take_longer_than_the_tpot_slo_becomes_smaller() -> None:
    # Beside 1024 prompt tokens a token takes 112 ms, and prompts come as fast as they can be computed.
    assert rehearse(PLANT, LONG, SLO(4.0, 0.018), Policy(), NOW, 1.0, 60).good < 0.5
    found = propose(question(tpot=0.018))
    assert found.setting != NOW
    assert found.gain > 0.4
    assert rehearse(PLANT, LONG, SLO(4.0, 0.018), Policy(), found.setting, 1.0, 60).good > 0.9


def test_a_setting_that_serves_as_well_as_any_stays() -> None:
    idle = replace(question(tpot=1.0), past=Past(tuple(Call(n * 10.0, 100, 5) for n in range(60)), 600.0))
    found = propose(idle)
    assert (found.setting, found.gain) == (NOW, 0.0)
    assert "100% of the last requests would be good, not 100%" in found.why


def test_the_same_question_has_the_same_answer() -> None:
    assert propose(question(tpot=0.018)) == propose(question(tpot=0.018))


def test_a_question_that_costs_too_much_is_answered_with_the_best_so_far() -> None:
    asked = question(tpot=0.018)
    nothing, some = propose(asked, budget=1), propose(asked, budget=20_000)
    assert (nothing.setting, nothing.runs) == (NOW, 1)
    assert some.gain > 0.4
    assert some.runs < 40  # of 125


def test_without_a_model_one_is_fitted_to_the_steps_that_were_seen() -> None:
    batches = [Batch(p, 0.0, d, 100 * d) for p in (0, 64, 256, 1024) for d in (0, 1, 4, 16)]
    steps = tuple(Sample(batch, MODEL.seconds(batch)) for batch in batches)
    fitted = replace(PLANT, model=None, steps=steps).fitted()
    assert fitted.model is not None
    assert fitted.model.of(512, 0.0, 8, 0) == pytest.approx(MODEL.of(512, 0.0, 8, 0), rel=0.02)


def test_what_was_observed_makes_steps_longer_in_a_rehearsal() -> None:
    slower = replace(PLANT, p_mixed=3.0, d_mixed=2.0, plain=1.5)
    large, small = slower.kind(Kind.P_HEAVY), slower.kind(Kind.D_HEAVY)
    assert large.of(100, 0.0, 0, 0) == pytest.approx(3.0 * MODEL.of(100, 0.0, 0, 0))
    assert small.of(100, 0.0, 0, 0) == pytest.approx(2.0 * MODEL.of(100, 0.0, 0, 0))
    assert large.of(0, 0.0, 5, 0) == small.of(0, 0.0, 5, 0) == pytest.approx(1.5 * MODEL.of(0, 0.0, 5, 0))


def test_slow_steps_of_p_heavy_instances_are_rehearsed_on_these_alone() -> None:
    # One prompt of 2000 tokens every 10 s: 210 ms where it is computed, and with S_D 0 that is P-heavy.
    past = Past(tuple(Call(n * 10.0, 2000, 2) for n in range(60)), 600.0)
    slow = replace(PLANT, p_mixed=2.0)
    for sliders, used in ((Sliders(1, 1, 2048, 0), 0.42), (Sliders(0, 2, 2048, 2048), 0.21)):
        setting = Setting(sliders, 1.0, 1.0)
        found = rehearse(slow, past, SLO(1.0, 1.0), Policy(), setting, 1.0, 40)
        assert found.used == pytest.approx(used, abs=0.001)


def test_a_question_and_its_answer_survive_the_way_to_another_process() -> None:
    asked = question(tpot=0.018)
    assert msgspec.json.decode(msgspec.json.encode(asked), type=Question) == asked


@pytest.mark.parametrize("sliders", [Sliders(1, 1, 512, 16), Sliders(2, 6, 8192, 0), Sliders(0, 4, 0, 256)])
def test_every_neighbour_is_a_setting_that_can_serve(sliders: Sliders) -> None:
    now = Setting(sliders, 0.5, 0.8)
    for one in [*far(question(0.05, now)), *near(now, 2048)]:
        assert one.sliders.instances == sliders.instances
        assert one.sliders.d_chunk <= 2048


def test_from_a_chunk_that_is_far_off_those_that_fit_the_tpot_slo_are_tried() -> None:
    # 4 requests/s of 50 tokens at 50 ms are 10 decodes, on one instance; 10 ms and 0.1 ms a token leave
    # room for 390 tokens in 50 ms, and for 315 in 42.5 ms.
    chunks = {one.sliders.d_chunk for one in far(question(0.05, Setting(Sliders(1, 1, 2048, 16), 0.5, 0.8)))}
    assert {304, 384} <= chunks


def test_an_instance_by_itself_finds_a_chunk_that_is_far_off() -> None:
    # Every 4 s two prompts, 0.3 s apart: the 224 ms of steps with the second make each of 50 tokens of the
    # first 4.5 ms later. A step with 32 prompt tokens takes 13.2 ms.
    past = Past(tuple(Call(4.0 * (n // 2) + 0.3 * (n % 2), 2000, 50) for n in range(60)), 120.0)
    now = Setting(Sliders(0, 1, 2048, 1024), 0.5, 10.0)
    found = propose(Question(PLANT, past, SLO(4.0, 0.0135), Policy(), now, 2.0))
    assert found.now.good < 0.9
    assert found.then.held
    assert (found.setting.sliders.instances, found.setting.sliders.p_chunk) == (1, 2048)
    assert 16 <= found.setting.sliders.d_chunk <= 64


def test_from_instances_that_are_all_alike_others_that_are_alike_are_tried() -> None:
    now = Setting(Sliders(0, 2, 2048, 1024), 0.5, 10.0)
    alike = {one.sliders.d_chunk for one in far(question(tpot=0.018, now=now)) if one.sliders.p_heavy == 0}
    # Beside 1.8 decodes 51 tokens take 85 % of 18 ms, and 78 all of it.
    assert {48, 64, 256, 512} <= alike


def test_where_few_are_p_heavy_chunks_that_fit_instances_that_are_all_alike_are_tried() -> None:
    now = Setting(Sliders(1, 1, 2048, 64), 0.5, 0.8)
    alike = {one.sliders.d_chunk for one in far(question(tpot=0.018, now=now)) if one.sliders.p_heavy == 0}
    assert {48, 64, 256, 512} <= alike  # as above, and not only large ones
