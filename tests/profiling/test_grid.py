"""Which steps are measured on an engine that can take only so much."""

from __future__ import annotations

import pytest

from taichi_serve.profiling.grid import Cell, Grid, Limits, passes
from taichi_serve.sliders import Kind

LIMITS = Limits(kv_capacity=100_000, sequence=8192, step=2304, sequences=128)


def test_every_chunk_is_measured_alone_and_beside_every_set_of_decodes() -> None:
    grid = Grid(chunks=(64, 256), decodes=(0, 4), contexts=(128, 1024))
    assert grid.cells(LIMITS) == [
        Cell(64, 0, 0),
        Cell(256, 0, 0),
        Cell(64, 4, 128),
        Cell(256, 4, 128),
        Cell(64, 4, 1024),
        Cell(256, 4, 1024),
    ]


def test_decodes_that_do_not_fit_into_the_kv_cache_or_the_step_are_left_out() -> None:
    grid = Grid(chunks=(2048,), decodes=(16, 64, 512), contexts=(128, 1024), fill=1_000_000)
    # 64 decodes with 1024 + 1024 tokens are 131,072: over 90 % of 100,000. 512 are more than 128 sequences.
    # Two prompts of two chunks take 8192 more.
    assert grid.cells(LIMITS) == [Cell(2048, 16, 128), Cell(2048, 16, 1024), Cell(2048, 64, 128)]
    assert grid.cells(Limits(100_000, 8192, 2060, 128)) == []


def test_context_of_many_decodes_together_is_bounded_but_one_decode_may_have_it_all() -> None:
    grid = Grid(chunks=(64,), decodes=(1, 16), contexts=(128, 4096), fill=3000)
    assert grid.cells(LIMITS) == [Cell(64, 1, 128), Cell(64, 1, 4096), Cell(64, 16, 128)]


def test_contexts_beyond_the_longest_sequence_become_the_longest_once() -> None:
    grid = Grid(chunks=(64,), decodes=(1,), contexts=(128, 4096, 8000))
    # 4096 - 1024 tokens to be made - 1.
    assert [cell.context for cell in grid.cells(Limits(100_000, 4096, 2304, 128))] == [128, 3071]


def test_a_prompt_takes_four_chunks_but_stays_within_the_sequence() -> None:
    assert [passes(chunk, LIMITS) for chunk in (64, 1024, 2048)] == [4, 4, 2]
    assert passes(2048, Limits(100_000, 4096, 2304, 128)) == 1
    assert passes(1024, Limits(6000, 4096, 2304, 128)) == 2  # two prompts hold KV at the same time


def test_a_chunk_of_which_no_two_fit_a_sequence_is_left_out() -> None:
    grid = Grid(chunks=(512, 2048), decodes=(0,))
    assert grid.cells(Limits(100_000, 4096, 2304, 128)) == [Cell(512, 0, 0)]


def test_two_sequences_of_a_step_are_left_for_the_prompts() -> None:
    grid = Grid(chunks=(64,), decodes=(63, 62), contexts=(128,))
    assert grid.cells(Limits(100_000, 4096, 2304, sequences=64)) == [Cell(64, 62, 128)]


def test_moves_are_measured_between_every_two_kinds() -> None:
    hops = Grid(moves=(128, 1024, 9000)).hops(LIMITS)
    assert len(hops) == 12
    assert {(hop.source, hop.target) for hop in hops} == {(a, b) for a in Kind for b in Kind}
    assert [hop.tokens for hop in hops[:3]] == [128, 1024, 8064]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"chunks": ()}, "chunks must be"),
        ({"chunks": (1,)}, "chunks must be whole numbers of at least 2"),
        ({"decodes": (-1,)}, "decodes must be"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(wrong: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Grid(**wrong)
