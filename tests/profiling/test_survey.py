"""The measurement finds the step model of a simulated cluster again, and goes on where it was interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
from miniature import CHUNKS, ENGINE, GRID, LIMITS, TRUTH, Miniature
from msgspec.structs import replace

from taichi_serve.cluster.simulated.agenda import Due
from taichi_serve.latency.profile import StepRow, load, save
from taichi_serve.messages import Command, Flow, Lost
from taichi_serve.profiling.draft import Draft, Moved
from taichi_serve.profiling.grid import Cell, Hop
from taichi_serve.profiling.probed import LostError
from taichi_serve.profiling.prober import Prober, medians
from taichi_serve.profiling.survey import Survey, disagreement, line, profile_of, transfers
from taichi_serve.sliders import Kind


class Interrupted(Exception):  # noqa: N818
    """Somebody pressed Ctrl-C."""


async def test_step_model_and_link_of_a_simulated_cluster_are_found_again(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "p.part", ENGINE)
    survey = Survey(GRID, LIMITS, draft, CHUNKS)
    done: list[None] = []
    await survey.run(Prober(Miniature()), lambda: done.append(None))
    assert len(done) == survey.known == survey.total == 3 * (3 * 5 + 2 * 4)
    profile = profile_of(draft, LIMITS.kv_capacity)
    assert profile.fit.error_p95 < 0.001
    for name in ("launch", "mixed", "token", "attention", "decode", "kv", "knee"):
        assert getattr(profile.fit, name) == pytest.approx(getattr(TRUTH, name), rel=0.01), name
    for source in Kind:
        for target in Kind:
            link = profile.transfer(source, target)
            assert link is not None
            assert link.latency == pytest.approx(0.005, abs=0.001)
            assert link.bytes_per_second == pytest.approx(1e9, rel=0.1)
    save(profile, tmp_path / "p.json")
    assert load(tmp_path / "p.json") == profile


async def test_who_is_interrupted_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "p.part"
    whole = Draft(tmp_path / "whole.part", ENGINE)
    await Survey(GRID, LIMITS, whole, CHUNKS).run(Prober(Miniature()), lambda: None)

    left = 7

    def interrupt() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Interrupted

    with pytest.raises(Interrupted):
        await Survey(GRID, LIMITS, Draft(path, ENGINE), CHUNKS).run(Prober(Miniature()), interrupt)
    draft = Draft(path, ENGINE)
    survey = Survey(GRID, LIMITS, draft, CHUNKS)
    assert survey.known == 7
    done: list[None] = []
    await survey.run(Prober(Miniature()), lambda: done.append(None))
    assert len(done) == 3 * (len(survey.cells) + len(survey.hops)) - 7
    assert draft.cells.keys() == whole.cells.keys()
    assert draft.moves.keys() == whole.moves.keys()


class Spell(Prober):
    """Steps take twice as long in the first so many cells that are measured, and another time as long as
    they do."""

    def __init__(self, cells: int) -> None:
        super().__init__(Miniature())
        self.left = cells

    async def measure(self, cell: Cell, passes: int, repeats: int) -> list[StepRow]:
        rows = await super().measure(cell, passes, repeats)
        self.left -= 1
        return rows if self.left < 0 else [replace(row, seconds=2 * row.seconds) for row in rows]


async def test_a_slow_spell_of_the_machine_is_in_no_median_and_its_cells_are_measured_again(
    tmp_path: Path,
) -> None:
    draft = Draft(tmp_path / "p.part", ENGINE)
    survey = Survey(GRID, LIMITS, draft, None)
    await survey.run(Spell(cells=7), lambda: None)
    # 7 of 15 in which one round says twice as much as two others: a third of all is measured again.
    assert [len(draft.cells[cell]) for cell in survey.cells] == [5] * 5 + [3] * 10
    assert survey.known == survey.total == 5 * 5 + 10 * 3
    assert profile_of(draft, LIMITS.kv_capacity).fit.error_p95 < 0.001


def test_rounds_disagree_by_what_the_median_step_is_apart() -> None:
    def rows(*seconds: float) -> list[StepRow]:
        return [StepRow(64, float(n), 4, 100, s) for n, s in enumerate(seconds)]

    # 0.1 of 1.0, 2 of 3 and nothing: the middle one.
    assert disagreement([rows(1.0, 2.0, 5.0), rows(1.1, 3.0, 5.0), rows(1.0, 4.0, 5.0)]) == pytest.approx(0.1)
    assert disagreement([[], []]) == 0.0


async def test_one_instance_is_measured_without_moves(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "p.part", ENGINE)
    survey = Survey(GRID, LIMITS, draft, None)
    assert survey.hops == []
    await survey.run(Prober(Miniature()), lambda: None)
    assert profile_of(draft, LIMITS.kv_capacity).transfers == []


async def test_an_instance_that_ends_is_an_error_that_names_it(tmp_path: Path) -> None:
    simulated = Miniature()
    simulated.cluster.agenda.push(0.5, Due.FACT, Lost(0.5, "i0", "exit code -9"))
    survey = Survey(GRID, LIMITS, Draft(tmp_path / "p.part", ENGINE), CHUNKS)
    with pytest.raises(LostError, match="instance i0 ended while it was measured: exit code -9"):
        await survey.run(Prober(simulated), lambda: None)


class Immovable(Miniature):
    """No request leaves the first so many times that one is told to."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def send(self, command: Command) -> None:
        if isinstance(command, Flow) and self.left:
            self.left -= 1
            return
        super().send(command)


async def test_a_move_that_did_not_happen_is_tried_again(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "p.part", ENGINE)
    survey = Survey(GRID, LIMITS, draft, CHUNKS)
    await survey.run(Prober(Immovable(times=2)), lambda: None)
    gaps = [moved.gap for hop in survey.hops for moved in draft.moves[hop]]
    assert len(gaps) == GRID.repeats * len(survey.hops)
    assert min(gaps) > 0.005


async def test_a_request_that_cannot_be_moved_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    survey = Survey(GRID, LIMITS, Draft(tmp_path / "p.part", ENGINE), CHUNKS)
    with pytest.raises(LostError, match="128 tokens could not be moved from i0 to i1; --no-moves"):
        await survey.run(Prober(Immovable(times=3)), lambda: None)


def test_one_stall_in_a_cell_is_not_seen_in_its_median() -> None:
    same = [StepRow(64, 2080.0, 4, kv, s) for kv, s in ((100, 0.01), (110, 9.0), (120, 0.012))]
    other = StepRow(64, 6176.0, 4, 100, 0.013)  # deeper in its prompt
    assert medians([*same, other]) == [StepRow(64, 2080.0, 4, 110, 0.012), other]


def test_a_transfer_is_the_gap_without_a_step_of_the_target_as_it_was_then() -> None:
    hop = Hop(Kind.P_HEAVY, Kind.D_HEAVY, 1000)
    # 6 ms and 1 ms for each 1,000 tokens; steps take 7 ms there, and 9 at 3,000 tokens
    moves = [Moved(hop, 1000, 0.014, 0.007), Moved(hop, 3000, 0.018, 0.009)]
    [link] = transfers(moves, bytes_per_token=2000)
    assert (link.source, link.target) == (Kind.P_HEAVY, Kind.D_HEAVY)
    assert link.latency == pytest.approx(0.006)
    assert link.bytes_per_second == pytest.approx(2e9)


def test_line_through_moves_is_latency_and_bandwidth() -> None:
    # 10 ms + 1 ms for each of 1 MB.
    assert line([(1e6, 0.011), (3e6, 0.013)]) == pytest.approx((0.010, 1e9))


def test_line_is_never_faster_than_light_nor_earlier_than_now() -> None:
    assert line([(1e6, 0.013), (3e6, 0.011)]) == pytest.approx((0.012, 1e13))  # noise: more took less
    assert line([(1e6, 0.001), (3e6, 0.009)]) == pytest.approx((0.0, 1e13 / 28e12 * 1e10), rel=1)
    assert line([(1e6, 0.01)]) == pytest.approx((0.01, 1e13))
