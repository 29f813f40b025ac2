"""Numbers that every front end sees."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine.admission_control import SharedAdmissionStats

from taichi_serve.frontend.several.shared import NOT_ACCEPTING, Shared


def test_nobody_accepts_before_it_says_so_and_what_one_writes_the_others_see(tmp_path: Path) -> None:
    made = Shared.make(tmp_path / "shared", 3)
    assert list(made.loads) == [NOT_ACCEPTING] * 3
    other = Shared(tmp_path / "shared", 3)
    other.loads[1] = 7
    assert list(made.loads) == [NOT_ACCEPTING, 7, NOT_ACCEPTING]


def test_open_requests_of_all_front_ends_add_up_until_one_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    made = Shared.make(path, 2)
    stats = [
        SharedAdmissionStats({"mp_admission_counters": Shared(path, 2).admissions}, 2, i) for i in (0, 1)
    ]
    stats[0].set_num_requests(5)
    stats[1].set_num_requests(3)
    assert [one.get_num_requests() for one in stats] == [8, 8]
    made.forget(0)
    assert stats[1].get_num_requests() == 3
