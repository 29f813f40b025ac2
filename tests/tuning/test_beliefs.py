"""What a rehearsal is told of the instances."""

from __future__ import annotations

from taichi_serve.instance import Instance
from taichi_serve.latency.known import LINKS
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.profile import Transfer
from taichi_serve.latency.profiled import UNMEASURED, Profiled
from taichi_serve.messages import Stepped
from taichi_serve.sliders import Kind
from taichi_serve.tuning.beliefs import Beliefs
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
