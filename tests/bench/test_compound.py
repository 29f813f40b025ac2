"""Workloads made of others: shares of a mix, parts of a change, and what makes no sense."""

from collections import Counter
from itertools import pairwise

import pytest

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.compound import Changing, Part
from taichi_serve.bench.lengths import LogNormal, Synthetic
from taichi_serve.bench.workload import workload

LIMIT = 32_768
SHORT, LONG = (Synthetic(LogNormal(n, 0.0, n), LogNormal(1, 0.0, 1)) for n in (100, 3000))


def test_of_a_mix_each_kind_of_request_has_the_share_that_its_weight_says():
    load = workload("mix:100/400@5,3000/10@1", LIMIT)
    prompts = [call.prompt_tokens for call in load.calls(2.0, 6000, 0)]
    # Sigma is 0.6: hardly any prompt of those with mean 3000 is below 600, and none of the others above it.
    assert sum(prompt > 600 for prompt in prompts) / len(prompts) == pytest.approx(1 / 6, abs=0.015)
    assert not load.shares


def test_a_mix_asks_the_same_at_every_rate():
    load = workload("mix:sharegpt,1200/100@2", LIMIT)
    slow, fast = (list(load.calls(rate, 40, 3)) for rate in (1.0, 4.0))
    assert [call.prompt_tokens for call in slow] == [call.prompt_tokens for call in fast]
    assert [call.at / 4 for call in slow] == pytest.approx([call.at for call in fast])


def test_a_weight_changes_how_many_there_are_and_not_how_long_they_are():
    few, many = (
        [c.prompt_tokens for c in workload(f"mix:100/400@{weight},3000/10@1", LIMIT).calls(1.0, 400, 0)]
        for weight in (5, 2)
    )
    longer = [[prompt for prompt in each if prompt > 1000] for each in (few, many)]
    assert len(longer[0]) < len(longer[1])
    assert longer[0] == longer[1][: len(longer[0])]


def test_the_parts_of_a_change_take_equally_long_and_come_as_fast_as_their_weights_say():
    # 70 requests at 7/s take 10 s; by the clock (cv 0) that is 10, 50 and 10 of them in 10 / 3 s each.
    load = Changing((Part(SHORT), Part(LONG, 5.0), Part(SHORT)))
    calls = list(load.calls(Arrivals("gamma", 0.0), 7.0, 70, 0))
    assert [call.prompt_tokens for call in calls] == [100] * 9 + [3000] * 50 + [100] * 11
    gaps = [round(b.at - a.at, 6) for a, b in pairwise(calls)]
    assert Counter(gaps) == {0.333333: 19, 0.066667: 50}
    assert calls[-1].at == pytest.approx(10.0)


def test_a_change_is_drawn_from_its_seed_and_only_stretched_by_the_rate():
    load = workload("change:1200/100,661/257@4,1200/100", LIMIT)
    slow, fast = (list(load.calls(rate, 60, 5)) for rate in (1.0, 2.0))
    assert [(c.prompt_tokens, c.output_tokens) for c in slow] == [
        (c.prompt_tokens, c.output_tokens) for c in fast
    ]
    assert [c.at / 2 for c in slow] == pytest.approx([c.at for c in fast])
    assert [c.at for c in slow] == sorted(c.at for c in slow)
    assert slow != list(load.calls(1.0, 60, 6))
    # The third part asks for what the first does, and is not the same requests once more.
    assert [c.prompt_tokens for c in slow[:5]] != [c.prompt_tokens for c in slow[-5:]]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mix:sharegpt", "expected two parts or more"),
        ("change:sharegpt@x,1200/100", "'sharegpt@x': expected a weight above 0"),
        ("mix:sharegpt@0,1200/100", "'sharegpt@0': expected a weight above 0"),
        ("mix:conversations,1200/100", "'conversations' is no part"),
        ("mix:sharegpt,lengths.csv", r"'lengths\.csv' is no part"),
    ],
)
def test_what_makes_no_workload_is_told_with_its_word(name, why):
    with pytest.raises(ValueError, match=why):
        workload(name, LIMIT)
