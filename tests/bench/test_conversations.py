"""Conversations: how they grow, what they share, and when they come."""

import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.births import Births, within
from taichi_serve.bench.conversations import LENGTHS, Conversations, Memory, Talks
from taichi_serve.bench.lengths import LogNormal
from taichi_serve.bench.sharing import requests, shared, turns
from taichi_serve.bench.workload import workload


def fixed(tokens):
    return LogNormal(tokens, 0.0, 10_000)


# A system prompt of 64 tokens, messages of 20, answers of 12, calls of 4, results of 36.
EVEN = Conversations(
    share=0.0, systems=1, turns=3.0, tools=0.5,
    system=fixed(64), message=fixed(20), answer=fixed(12), call=fixed(4), result=fixed(36),
)  # fmt: skip
ALL = replace(EVEN, share=EVEN.most_share)  # nothing beside conversations


def chains(what, count=300, rate=1.0, seed=0, arrivals=Arrivals()):
    return [[turn for _, turn in turns(call)] for call in Talks(what).calls(arrivals, rate, count, seed)]


def test_every_turn_is_the_one_before_with_its_answer_and_a_message_or_the_result_of_a_tool():
    kinds = set()
    for chain in chains(ALL):
        assert chain[0].prompt_tokens == 64 + 20
        for before, after in pairwise(chain):
            new = after.prompt_tokens - before.prompt_tokens - before.output_tokens
            assert new == (36 if before.output_tokens == 4 else 20)
            assert after.blocks[: len(before.blocks)] == before.blocks
            kinds.add(before.output_tokens)
    assert kinds == {4, 12}


def test_a_result_comes_after_the_tools_wait_and_a_message_after_its_user_has_thought():
    waits = {4: [], 12: []}
    for chain in chains(replace(ALL, think=20.0, wait=1.0), 6000):
        for before, after in pairwise(chain):
            waits[before.output_tokens].append(after.at)
    assert statistics.fmean(waits[12]) == pytest.approx(20.0, rel=0.1)
    assert statistics.fmean(waits[4]) == pytest.approx(1.0, rel=0.1)


def test_blocks_are_those_of_16_tokens_of_prompt_and_answer_and_a_system_prompt_is_everybodys():
    heads = [chain[0] for chain in chains(ALL)]
    assert all(len(call.blocks) == (64 + 20 + call.output_tokens) // 16 for call in heads)
    assert len({call.blocks[:4] for call in heads}) == 1
    # Block 5 has 16 tokens of the message: nobody else has them.
    assert len({call.blocks[4] for call in heads}) == len(heads)


def test_system_prompts_are_as_popular_as_zipf_says():
    heads = [chain[0] for chain in chains(replace(ALL, systems=3, zipf=1.0), 9000)]
    counts = sorted(sum(c.blocks[0] == first for c in heads) for first in {c.blocks[0] for c in heads})
    assert [count / len(heads) for count in counts] == pytest.approx([2 / 11, 3 / 11, 6 / 11], abs=0.03)


def test_the_number_of_turns_is_geometric():
    lengths = [len(talk.turns) for talk in map(Memory(ALL, 0).talk, range(8000))]
    assert statistics.fmean(lengths) == pytest.approx(3.0, rel=0.03)
    assert sum(n == 1 for n in lengths) / 8000 == pytest.approx(1 / 3, abs=0.02)
    assert sum(n == 2 for n in lengths) / 8000 == pytest.approx(2 / 9, abs=0.02)


def test_what_shares_nothing_makes_up_for_what_conversations_share_too_much():
    # A message of 12 tokens and half a block are 20 of a prompt of 92.
    what = replace(EVEN, tools=0.0, turns=1.0, system=fixed(80), message=fixed(12), share=0.0)
    assert what.most_share == pytest.approx(1 - 20 / 92)
    what = replace(what, share=what.most_share * 0.75)
    assert what.alone == pytest.approx(0.25)
    calls = list(Talks(what).calls(Arrivals(), 1.0, 8000, 0))
    system = Memory(what, 0).system(0)[1][0]
    assert sum(system not in call.blocks for call in calls) / 8000 == pytest.approx(0.25, abs=0.02)
    assert shared(calls, 16) == pytest.approx(0.75 * 80 / 92, abs=0.03)


@pytest.mark.parametrize("words", ["", ":share=0.9,turns=8", ":share=0.5,turns=3,tools=0"])
def test_a_long_run_shares_what_was_asked_for(words):
    load = workload(f"conversations{words}", 1 << 20)
    wanted = load.source.what.share
    assert shared(load.calls(4.0, 12_000, 0), 16) == pytest.approx(wanted, abs=0.03)


def test_conversations_are_the_same_at_every_rate_and_of_another_seed_others():
    def contents(rate, seed):
        plain = [
            [
                (t.prompt_tokens, t.output_tokens, t.blocks, 0.0 if n == 0 else t.at)
                for n, t in enumerate(chain)
            ]
            for chain in chains(Conversations(), 400, rate, seed)
        ]
        return {chain[0][2]: chain for chain in plain}

    slow, fast, other = contents(0.5, 3), contents(20.0, 3), contents(0.5, 4)
    both = set(slow) & set(fast)
    assert len(both) > 50
    for name in both:
        less, more = sorted((slow[name], fast[name]), key=len)
        assert more[: len(less)] == less
    assert not set(slow) & set(other)


def test_the_same_seed_and_rate_give_the_same_calls():
    assert chains(Conversations(), 200, 2.0, 5) == chains(Conversations(), 200, 2.0, 5)


@settings(max_examples=60, deadline=None)
@given(
    limit=st.integers(64, 5000),
    rate=st.floats(0.01, 100.0),
    count=st.integers(1, 120),
    seed=st.integers(0, 100),
    share=st.floats(0.0, 0.8),
    turns_=st.floats(1.0, 30.0),
    tools=st.floats(0.0, 1.0),
    cv=st.sampled_from([0.0, 1.0, 3.0]),
)
def test_there_are_as_many_requests_as_asked_for_in_order_and_within_the_limit(
    limit, rate, count, seed, share, turns_, tools, cv
):
    what = Conversations(turns=turns_, tools=tools, share=0.0)
    what = replace(what, share=min(share, what.most_share)).fitted(limit)
    calls = list(Talks(what).calls(Arrivals("gamma", cv), rate, count, seed))
    every = [turn for _, turn in requests(calls)]
    assert len(every) == count
    assert [call.at for call in calls] == sorted(call.at for call in calls)
    for call in every:
        assert call.prompt_tokens + call.output_tokens <= limit
        assert len(call.blocks) == (call.prompt_tokens + call.output_tokens) // 16
        assert call.at >= 0


def test_a_turn_that_does_not_fit_starts_over_behind_the_system_prompt():
    what = replace(ALL, tools=0.0, turns=40.0).fitted(256)
    over = 0
    for chain in chains(what, 400):
        for before, after in pairwise(chain):
            if after.prompt_tokens < before.prompt_tokens:
                over += 1
                assert before.prompt_tokens + before.output_tokens + 20 + 12 > 256
                assert after.prompt_tokens == 64 + 20
                assert after.blocks[:4] == before.blocks[:4]
                assert not set(after.blocks[4:]) & set(before.blocks)
    assert over > 20


# --------------------------------------------------------------------------------------------------- when


def test_beginnings_are_one_in_so_many_turns_in_the_long_run_and_more_at_first():
    # 2 requests/s, 4 turns, 10 s between: 0.5 + 1.5 exp(-t / 10) a second, so 0.5 t + 15 (1 - exp(-t / 10)).
    births = Births(2.0, 4.0, 10.0)
    assert births.begun(10.0) == pytest.approx(5 + 15 * 0.6321206)
    assert births.begun(1000.0) == pytest.approx(515.0)
    assert births.when(births.begun(37.0)) == pytest.approx(37.0)
    assert Births(2.0).when(8.0) == pytest.approx(4.0)
    assert list(Births(0.0).times(Arrivals(), None)) == []


@given(st.floats(0.001, 1e3), st.floats(1.0, 1e3), st.floats(0.0, 1e4), st.floats(0.0, 1e5))
def test_a_time_is_found_for_every_number(rate, turns_, between, number):
    births = Births(rate, turns_, between)
    assert births.begun(births.when(number)) == pytest.approx(number, rel=1e-6, abs=1e-6)


def test_requests_come_at_the_rate_from_the_first_second_to_the_last():
    # 20 runs of 600 requests at 5/s in 120 s, in six parts of 20 s with 100 each.
    what = replace(Conversations(), think=15.0, wait=1.0)
    parts = [0] * 6
    for seed in range(20):
        for at, _ in requests(Talks(what).calls(Arrivals(), 5.0, 600, seed)):
            if at < 120.0:
                parts[int(at / 20.0)] += 1
    assert parts[:5] == [pytest.approx(2000, rel=0.12)] * 5  # by the last one some runs are through


def test_the_first_requests_are_chosen_by_hand():
    # Conversations begin at 0 and 5 with 3 and 1 turns, 4 s apart, and one request alone comes at 6.
    pauses = {0: [0.0, 4.0, 4.0], 1: [0.0], 2: [0.0]}

    def plan(count):
        made = within(count, iter([0.0, 5.0, 50.0]), iter([6.0]), lambda number: pauses[number])
        return [(born.at, born.number, born.turns) for born in made]

    assert plan(1) == [(0.0, 0, 1)]
    assert plan(2) == [(0.0, 0, 2)]
    assert plan(4) == [(0.0, 0, 2), (5.0, 1, 1), (6.0, 0, 0)]
    assert plan(6) == [(0.0, 0, 3), (5.0, 1, 1), (6.0, 0, 0), (50.0, 2, 1)]


# -------------------------------------------------------------------------------------------------- words


def test_settings_are_chosen_by_name():
    what = workload("conversations:share=0.6, turns=3,think=5,systems=2,message=50", 1 << 20).source.what
    assert (what.share, what.turns, what.think, what.systems, what.message.mean) == (0.6, 3.0, 5.0, 2, 50.0)
    assert what.answer == Conversations().answer


def test_a_scale_is_one_of_all_lengths():
    what = workload("conversations", 1 << 20, scale=0.25).source.what
    assert [getattr(what, name).mean for name in LENGTHS] == [200, 30, 62.5, 10, 75]


BAD = [
    ("turn=5", "'turn' is none of share, turns, think, tools, wait, zipf, systems, system, message"),
    ("turns", "turns: expected a number, not ''"),
    ("", "'' is none of share"),
    ("turns=many", "turns: expected a number, not 'many'"),
    ("systems=1.5", "systems: expected a whole number, not '1.5'"),
    ("turns=5,turns=6", "turns is there twice"),
    ("turns=0.5", "turns must be from 1 to 1000, not 0.5"),
    ("turns=nan", "turns must be from 1 to 1000, not nan"),
    ("think=-1", "think must be from 0 to 1e+06, not -1.0"),
    ("message=0", "message: expected 1 to 1,000,000 tokens, not 0"),
    ("message=inf", "message: expected 1 to 1,000,000 tokens, not inf"),
    ("share=0.99", "share=0.99 is more than the 0.928 that such conversations have"),
]


@pytest.mark.parametrize(("words", "line"), BAD)
def test_settings_that_make_no_sense_are_one_line(words, line):
    with pytest.raises(ValueError, match=r"^workload ") as error:
        workload(f"conversations:{words}", 4096)
    assert str(error.value).startswith(f"workload 'conversations:{words}': {line}")
    assert "\n" not in str(error.value)


def test_conversations_have_no_times_of_their_own():
    with pytest.raises(ValueError, match=r"^workload 'conversations' has no arrival times of its own"):
        workload("conversations", 4096, arrivals=Arrivals("trace"))
