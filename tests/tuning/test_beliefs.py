"""What a rehearsal is told of the instances."""

from __future__ import annotations

from taichi_serve.latency.known import LINKS
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.profile import Transfer
from taichi_serve.latency.profiled import UNMEASURED, Profiled
from taichi_serve.sliders import Kind
from taichi_serve.tuning.beliefs import Beliefs
from taichi_serve.tuning.rehearsal import Limits

LIMITS = Limits(100_000, 64, 4096, 2048, 16, 4096)
MODEL = Roofline(0.010, token=0.0001)


def transfers(known: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
    links = {(link.source, link.target): link for link in known}
    plant = Beliefs(LIMITS, Profiled(MODEL, links, 4096)).plant()
    assert plant is not None and plant.model == MODEL
    return plant.transfers


def test_what_is_known_is_enough_for_a_plant_before_any_step() -> None:
    assert transfers(LINKS) == LINKS
    assert len(LINKS) == len(Kind) ** 2


def test_a_profile_without_moves_has_the_slowest_link_that_was_seen() -> None:
    assert transfers(()) == (UNMEASURED,)
