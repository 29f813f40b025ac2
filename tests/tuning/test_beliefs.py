"""What a rehearsal is told of the instances."""

from __future__ import annotations

from taichi_serve.instance import Instance
from taichi_serve.latency.known import LINKS
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.profile import Transfer
from taichi_serve.latency.profiled import UNMEASURED, Profiled
from taichi_serve.messages import Stepped
from taichi_serve.sliders import Kind
from taichi_serve.tuning.beliefs import Beliefs, crowded
from taichi_serve.tuning.rehearsal import Limits

LIMITS = Limits(100_000, 64, 4096, 2048, 16, 4096)
MODEL = Roofline(0.010, token=0.0001)


def transfers(known: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
    links = {(link.source, link.target): link for link in known}
    plant = Beliefs(LIMITS, Profiled(MODEL, links, 4096)).plant({})
    assert plant is not None and plant.model == MODEL
    return plant.transfers


def test_what_is_known_is_enough_for_a_plant_before_any_step() -> None:
    assert transfers(LINKS) == LINKS
    assert len(LINKS) == len(Kind) ** 2


def test_a_profile_without_moves_has_the_slowest_link_that_was_seen() -> None:
    assert transfers(()) == (UNMEASURED,)


def stepped(predictor: Profiled, name: str, kind: Kind, tokens: int, slower: float) -> None:
    """A step with so many prompt tokens and nothing else, that took so many times what the model says."""
    instance = Instance(name, kind, chunk=tokens, kv_capacity=100_000)
    predictor.stepped(instance, Stepped(1.0, name, slower * (0.010 + 0.0001 * tokens), tokens, 0, 0))


def test_large_chunks_that_are_slow_say_nothing_of_small_ones() -> None:
    predictor = Profiled(MODEL, {}, 4096)
    stepped(predictor, "i0", Kind.P_HEAVY, 2000, slower=1.2)
    stepped(predictor, "i1", Kind.D_HEAVY, 400, slower=0.9)
    stepped(predictor, "i2", Kind.D_HEAVY, 400, slower=1.0)
    kinds = {"i0": Kind.P_HEAVY, "i1": Kind.D_HEAVY, "i2": Kind.D_HEAVY}
    plant = Beliefs(LIMITS, predictor).plant(kinds)
    assert plant is not None
    assert (round(plant.p_mixed, 9), round(plant.d_mixed, 9), plant.plain) == (1.2, 0.95, 1.0)


def test_a_kind_that_computed_no_prompts_is_believed_to_be_as_fast_as_the_other() -> None:
    predictor = Profiled(MODEL, {}, 4096)
    stepped(predictor, "i0", Kind.D_HEAVY, 400, slower=0.9)
    plant = Beliefs(LIMITS, predictor).plant({"i0": Kind.D_HEAVY})
    assert plant is not None
    assert (round(plant.p_mixed, 9), round(plant.d_mixed, 9)) == (0.9, 0.9)


def decoded(beliefs: Beliefs, tokens: int, decodes: int, slower: float) -> None:
    """A step on D-heavy i0 with so many decodes, and prompt tokens beside them."""
    instance = Instance("i0", Kind.D_HEAVY, chunk=400, kv_capacity=100_000)
    step = Stepped(1.0, "i0", slower * MODEL.of(tokens, 0.0, decodes, 0), tokens, decodes, 0)
    beliefs.predictor.stepped(instance, step)
    beliefs.stepped(instance, step)


def plain(beliefs: Beliefs) -> float:
    """The factor of steps without prompts."""
    plant = beliefs.plant({"i0": Kind.D_HEAVY})
    assert plant is not None
    return plant.plain


def test_rare_steps_without_prompts_say_little_of_those_with_many_decodes() -> None:
    """Of 100 steps 99 had prompts and were 1.1 times as slow as the model; one was faster than it."""
    beliefs = Beliefs(LIMITS, Profiled(MODEL, {}, 4096))
    decoded(beliefs, 0, 2, slower=0.9)
    for _ in range(99):
        decoded(beliefs, 400, 30, slower=1.1)
    assert 0.99 < plain(beliefs) < 1.0


def test_a_step_without_prompts_counts_as_often_as_it_has_decodes() -> None:
    beliefs = Beliefs(LIMITS, Profiled(MODEL, {}, 4096))
    decoded(beliefs, 0, 40, slower=1.1)
    for _ in range(10):
        decoded(beliefs, 0, 1, slower=0.9)
    # 40 times 14 ms at 1.1, and 10 times 10.1 ms at 0.9.
    assert round(plain(beliefs), 3) == 1.069


def test_full_steps_of_another_split_are_remembered_while_there_are_none() -> None:
    """Full steps at 1P1D; then, at 0P2D, steps have prompts, and a load ends with light ones."""
    beliefs = Beliefs(LIMITS, Profiled(MODEL, {}, 4096))
    for _ in range(700):
        decoded(beliefs, 0, 40, slower=1.12)
    for _ in range(4000):
        decoded(beliefs, 128, 20, slower=1.0)
    for _ in range(500):
        decoded(beliefs, 0, 3, slower=0.92)
    assert 1.1 < plain(beliefs) < 1.12


def test_the_factor_without_prompts_goes_towards_the_model_by_the_share_of_steps_that_had_some() -> None:
    assert round(crowded(0.9, 1.1, 0.5), 9) == 0.95
    assert crowded(0.9, 1.1, 0.0) == 0.9
    assert round(crowded(0.8, 0.9, 1.0), 9) == 0.9  # all steps are faster than the model
    assert crowded(1.2, 1.1, 1.0) == 1.2  # and never becomes smaller
