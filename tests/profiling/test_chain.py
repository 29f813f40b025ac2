"""Which steps of prompts back to back are an engine's usual ones, and what each of them held."""

from __future__ import annotations

from taichi_serve.latency.profile import StepRow
from taichi_serve.messages import Stepped
from taichi_serve.profiling.chain import Chain
from taichi_serve.profiling.grid import Cell

# Launching takes 20 ms and computing 5: the first chunk of all shows two launches, the last one what is left.
FIRST, USUAL, LAST = 0.045, 0.025, 0.002
BESIDE = Cell(chunk=64, decodes=2, context=100)


def seen(chain: Chain, steps: list[tuple[int, int, float]]) -> list[StepRow]:
    """The rows of steps given as (prompt tokens, decodes, seconds); each decode grows by a token a step."""
    for number, (tokens, decodes, seconds) in enumerate(steps):
        step = Stepped(float(number), "i0", seconds, tokens, decodes, 0)
        chain.saw(step, decodes * (100 + number))
    return chain.rows()


def test_first_and_last_step_with_prompt_tokens_and_the_first_without_are_left_out() -> None:
    steps = [(64, 2, FIRST), (64, 2, USUAL), (64, 2, USUAL), (64, 2, USUAL), (64, 2, LAST)]
    steps += [(0, 2, 0.03), (0, 2, 0.007), (0, 2, 0.008), (0, 2, 0.009)]
    # A prompt of three chunks, and a last one of two: 64 tokens attend 64 x 65 / 2 pairs, and 64 x 64
    # more for each chunk before.
    assert seen(Chain(BESIDE, passes=3, prompts=2), steps) == [
        StepRow(64, 2080.0 + 4096, 2, 202, USUAL),
        StepRow(64, 2080.0 + 8192, 2, 204, USUAL),
        StepRow(64, 2080.0, 2, 206, USUAL),
        StepRow(0, 0.0, 2, 212, 0.007),
        StepRow(0, 0.0, 2, 214, 0.008),
    ]


def test_without_decodes_every_depth_is_left_once_for_each_prompt_but_one() -> None:
    chain = Chain(Cell(64, 0, 0), passes=4, prompts=3)
    assert chain.prompt_sizes == [256, 256, 128]
    rows = seen(chain, [(64, 0, FIRST), *[(64, 0, USUAL)] * 8, (64, 0, LAST)])
    assert sorted(row.attention for row in rows) == [2080, 2080, 6176, 6176, 10272, 10272, 14368, 14368]
    assert {row.seconds for row in rows} == {USUAL}


def test_where_the_next_prompt_came_late_the_steps_around_the_gap_are_left_out() -> None:
    steps = [(64, 2, FIRST), (64, 2, USUAL), (64, 2, LAST), (0, 2, 0.03), (64, 2, FIRST), (64, 2, USUAL)]
    rows = seen(Chain(BESIDE, passes=3, prompts=3), [*steps, (64, 2, USUAL), (64, 2, USUAL), (64, 2, LAST)])
    assert [row.attention for row in rows] == [6176, 6176, 10272, 2080]


def test_a_chunk_that_was_split_is_dropped_and_those_after_it_keep_their_depth() -> None:
    # 64 + 64, and of the next prompt 40 + 24 and then 64 at its own depth.
    steps = [(64, 0, FIRST), (64, 0, USUAL), (40, 0, USUAL), (24, 0, USUAL), (64, 0, USUAL), (64, 0, USUAL)]
    steps += [(64, 0, LAST)]
    rows = seen(Chain(Cell(64, 0, 0), passes=2, prompts=3), steps)
    assert [row.attention for row in rows] == [6176, 6176, 2080]


def test_a_step_that_lacked_a_decode_is_dropped() -> None:
    steps = [
        (64, 2, FIRST),
        (64, 1, USUAL),
        (64, 2, USUAL),
        (64, 2, LAST),
        (0, 2, 1.0),
        (0, 1, 1.0),
        (0, 2, 1.0),
    ]
    assert seen(Chain(BESIDE, passes=4, prompts=1), steps) == [StepRow(64, 2080.0 + 8192, 2, 204, USUAL)]


def test_nothing_counts_where_a_prompt_was_not_computed_whole() -> None:
    assert seen(Chain(BESIDE, passes=2, prompts=2), [(64, 2, USUAL)] * 3) == []


def test_steps_before_the_first_prompt_is_computed_are_none_of_the_chain() -> None:
    chain = Chain(BESIDE, passes=2, prompts=2)
    rows = seen(chain, [(0, 2, 0.05)] * 4 + [(64, 2, USUAL)] * 4)
    assert [row.prefill_tokens for row in rows] == [64, 64]
    assert chain.plain == 0
    seen(chain, [(0, 2, 0.007)] * 3)
    assert chain.plain == 3
