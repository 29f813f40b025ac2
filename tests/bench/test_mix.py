"""Requests of several classes: which one each has, and that all of a conversation are of one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from taichi_serve.bench.mix import Mix, Part
from taichi_serve.bench.sharing import turns
from taichi_serve.bench.workload import workload
from taichi_serve.classes import SLOClass
from taichi_serve.slo import SLO

TIGHT, LOOSE = SLO(1.0, 0.04), SLO(10.0, 0.2)
THREE_TO_ONE = Mix((Part("tight", TIGHT, 3.0), Part("loose", LOOSE, 1.0)))


def test_classes_come_in_their_shares_with_their_slos() -> None:
    calls = list(workload("sharegpt", 8192, mix=THREE_TO_ONE).calls(2.0, 2000, seed=1))
    loose = [call for call in calls if call.slo_class == "loose"]
    assert len(loose) == pytest.approx(500, abs=60)
    assert {call.slo for call in loose} == {LOOSE}
    assert {call.slo for call in calls if call.slo_class == "tight"} == {TIGHT}


def test_lengths_and_times_are_those_without_classes_and_the_class_is_the_same_at_every_rate() -> None:
    plain = list(workload("sharegpt", 8192).calls(2.0, 50, seed=1))
    mixed = list(workload("sharegpt", 8192, mix=THREE_TO_ONE).calls(2.0, 50, seed=1))
    faster = list(workload("sharegpt", 8192, mix=THREE_TO_ONE).calls(9.0, 50, seed=1))
    assert [(c.at, c.prompt_tokens, c.output_tokens) for c in plain] == [
        (c.at, c.prompt_tokens, c.output_tokens) for c in mixed
    ]
    assert [c.slo_class for c in mixed] == [c.slo_class for c in faster]
    assert {c.slo for c in plain} == {None}


def test_all_turns_of_a_conversation_are_of_one_class() -> None:
    calls = list(workload("conversations:turns=4", 8192, mix=THREE_TO_ONE).calls(1.0, 100, seed=0))
    kinds = [{call.slo_class for _, call in turns(first)} for first in calls]
    assert {len(kind) for kind in kinds} == {1}
    assert set().union(*kinds) == {"tight", "loose"}
    assert max(len(list(turns(first))) for first in calls) > 1


def test_a_class_without_an_slo_has_the_servers() -> None:
    mix = Mix.of({"a": SLOClass("a", ttft_slo=9.0), "b": SLOClass("b", share=3.0)}, TIGHT)
    assert [part.slo for part in mix.parts] == [SLO(9.0, 0.04), TIGHT]
    assert mix.words == "25% a (9 s and 40 ms), 75% b (1 s and 40 ms)"


def test_a_scheduler_knows_what_may_become_of_the_requests_of_a_class() -> None:
    known = (
        SLOClass("a", 9.0, 0.04, weight=3.0, refuse=False, share=2.0),
        SLOClass("default", demote=False),
    )
    mix = Mix.of({one.name: one for one in known}, TIGHT)
    assert mix.classes == (replace(known[0], share=1.0), known[1])
