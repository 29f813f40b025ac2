"""Settings and the way from one to another."""

from __future__ import annotations

import pytest

from taichi_serve.sliders import Sliders
from taichi_serve.tuning.setting import Setting

HERE = Setting(Sliders(2, 6, 8192, 192), 0.5, 0.8)


@pytest.mark.parametrize(
    ("p_heavy", "chunk", "next_one", "next_chunk"),
    [(5, 96, 3, 160), (0, 512, 1, 352), (3, 96, 3, 96), (2, 64, 2, 64)],
)
def test_s_d_goes_as_far_on_its_way_as_r_pd(p_heavy: int, chunk: int, next_one: int, next_chunk: int) -> None:
    target = Setting(Sliders(p_heavy, 8 - p_heavy, 8192, chunk), 0.3, 0.65)
    way = Setting(Sliders(next_one, 8 - next_one, 8192, next_chunk), 0.3, 0.65)
    assert HERE.towards(target, 8192) == way


def test_a_way_of_some_turns_ends_at_the_target_exactly() -> None:
    here, target = HERE, Setting(Sliders(5, 3, 8192, 100), 0.3, 1.0)  # 100 is no multiple of a block
    for _ in range(3):
        here = here.towards(target, 8192)
    assert here == target
