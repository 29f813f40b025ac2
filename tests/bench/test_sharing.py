"""How much of the prompts an infinite cache has, by hand."""

import pytest

from taichi_serve.bench.blocks import alike, anew, chained
from taichi_serve.bench.sharing import requests, seen, shared
from taichi_serve.cluster.simulated.job import Call


def test_only_full_blocks_that_were_there_before_count():
    calls = [
        Call(0.0, 40, 10, blocks=(1, 2, 3)),  # nothing was there
        Call(1.0, 40, 10, blocks=(1, 2, 4)),  # 32 tokens: the third block is not full of prompt
        Call(2.0, 48, 8, blocks=(1, 2, 3)),  # all three, but the last token of a prompt is computed: 32
        Call(3.0, 49, 8, blocks=(1, 2, 3)),  # 48
        Call(4.0, 49, 8, blocks=(9, 2, 3)),  # a hash stands for all before it: nothing
    ]
    assert [one.tokens for one in seen(calls, 16)] == [0, 32, 32, 48, 0]
    assert shared(calls, 16) == pytest.approx(112 / 226)
    assert shared([], 16) == 0.0


def test_the_last_token_of_an_answer_is_never_in_a_cache():
    first = Call(0.0, 20, 12, blocks=(1, 2))  # 32 tokens, but the KV of the 32nd was not computed
    assert [one.tokens for one in seen([first, Call(1.0, 40, 1, blocks=(1, 2))], 16)] == [0, 16]


def test_turns_come_in_order_of_time_if_answers_took_none():
    talk = Call(1.0, 1, 1, "a", then=Call(5.0, 2, 1, "b", then=Call(5.0, 3, 1, "c")))
    assert [(at, call.request) for at, call in requests([talk, Call(7.0, 1, 1, "d")])] == [
        (1.0, "a"), (6.0, "b"), (7.0, "d"), (11.0, "c"),
    ]  # fmt: skip


def test_hashes_are_alike_as_far_as_the_ids_are():
    one, other = chained([1, 2, 3]), chained([1, 2, 4])
    assert alike(tuple(one), tuple(other)) == 2
    assert alike((), tuple(one)) == 0
    assert alike(tuple(one), tuple(one)) == 3
    assert chained([3], before=one[1]) == one[2:]
    assert all(0 <= block < 1 << 64 for block in one)


def test_a_lap_is_alike_within_itself_and_unlike_others():
    assert anew((1, 2), 0) == (1, 2)
    assert anew((1,), 3) == anew((1, 2), 3)[:1]
    assert len({anew((5,), lap) for lap in range(100)}) == 100
