"""What was measured survives an interruption, and is only continued on the same engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from taichi_serve.latency.identity import Identity
from taichi_serve.latency.profile import ProfileError, StepRow
from taichi_serve.profiling.draft import Draft, Moved, Steps
from taichi_serve.profiling.grid import Cell, Hop
from taichi_serve.sliders import Kind

ENGINE = Identity("tiny", "one core", 2048, {"vllm": "0.32.0"}, {"dtype": "float32", "enforce_eager": True})
ALONE = Steps(Cell(64, 0, 0), [StepRow(64, 2080.0, 0, 0, 0.01)])
BESIDE = Steps(Cell(64, 4, 128), [StepRow(64, 2080.0, 4, 600, 0.02)])
MOVED = Moved(Hop(Kind.P_HEAVY, Kind.D_HEAVY, 128), 128, 0.03, 0.01)


def test_what_was_added_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "p.json.part"
    draft = Draft(path, ENGINE)
    for item in (ALONE, MOVED, BESIDE, ALONE):
        draft.add(item)
    again = Draft(path, ENGINE)
    assert again.cells == {ALONE.cell: [ALONE.rows, ALONE.rows], BESIDE.cell: [BESIDE.rows]}
    assert again.moves == {MOVED.hop: [MOVED]}
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_torn_last_line_is_measured_again_and_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "p.json.part"
    draft = Draft(path, ENGINE)
    draft.add(ALONE)
    draft.add(BESIDE)
    path.write_bytes(path.read_bytes()[:-20])
    again = Draft(path, ENGINE)
    assert list(again.cells) == [ALONE.cell]
    again.add(BESIDE)
    assert Draft(path, ENGINE).cells == {ALONE.cell: [ALONE.rows], BESIDE.cell: [BESIDE.rows]}


def test_a_draft_of_another_engine_or_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json.part"
    Draft(path, ENGINE).add(ALONE)
    beside = replace(ENGINE, settings={**ENGINE.settings, "neighbours": 3})
    for other in (replace(ENGINE, device="two cores"), beside):
        with pytest.raises(ProfileError, match="another model, device, version or setting; remove it"):
            Draft(path, other)
    path.write_text("shopping list\n")  # whatever that was, it is not ours to overwrite
    with pytest.raises(ProfileError, match="remove it to begin anew"):
        Draft(path, ENGINE)


def test_a_draft_without_anything_measured_binds_nobody(tmp_path: Path) -> None:
    path = tmp_path / "p.json.part"
    Draft(path, ENGINE)
    Draft(path, replace(ENGINE, device="two cores")).add(ALONE)
    with pytest.raises(ProfileError, match="remove it"):
        Draft(path, ENGINE)


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be written: No such file or directory"):
        Draft(tmp_path / "nowhere" / "p.json.part", ENGINE)
