"""The order in which a real vLLM scheduler takes waiting prompts in, by the places they were given."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

pytest.importorskip("vllm")

from flowbench import Instance, Stream, request

from taichi_serve.cluster.vllm.core.order import in_running, put_off
from taichi_serve.cluster.vllm.wire import Marks

LENGTH = 32


@pytest.fixture
def instance() -> Instance:
    """It takes 16 prompt tokens into a step."""
    streams = {name: Stream([number] * 64) for number, name in enumerate("abcd", 20)}
    return Instance(0, Random(3), streams, chunk=16)


def come(instance: Instance, **places: float) -> None:
    """Prompts of two chunks each come, with these places."""
    for name, by in places.items():
        tokens = instance.streams[name].tokens[:LENGTH]
        instance.scheduler.add_request(request(name, tokens, 4, Marks(by=by)))


def waiting(instance: Instance) -> list[str]:
    return [one.request_id for one in instance.scheduler.waiting]


def test_a_prompt_lines_up_before_those_with_a_later_place(instance: Instance) -> None:
    come(instance, a=5.0, b=9.0, c=7.0, d=5.0)
    assert waiting(instance) == ["a", "d", "c", "b"]


def test_without_places_the_order_is_that_of_arrival(instance: Instance) -> None:
    come(instance, b=0.0, a=0.0, d=0.0, c=0.0)
    assert waiting(instance) == ["b", "a", "d", "c"]


def test_who_is_put_off_lets_the_others_go_first_and_is_best_effort(instance: Instance) -> None:
    come(instance, a=5.0, b=5.0, c=5.0)
    put_off(instance.scheduler, "a", 8.0)
    assert waiting(instance) == ["b", "c", "a"]
    assert in_running(instance.scheduler.requests["a"]) > in_running(instance.scheduler.requests["b"])


def test_a_prompt_that_has_begun_goes_on(instance: Instance) -> None:
    come(instance, a=5.0, b=5.0)
    assert instance.plan().num_scheduled_tokens == {"a": 16}
    put_off(instance.scheduler, "a", 8.0)
    assert waiting(instance) == ["b"]
    assert [one.request_id for one in instance.scheduler.running] == ["a"]


def test_one_that_is_not_here_is_no_error(instance: Instance) -> None:
    put_off(instance.scheduler, "gone", 8.0)
    assert waiting(instance) == []


def test_all_are_served_in_the_end(instance: Instance) -> None:
    come(instance, a=5.0, b=9.0, c=7.0, d=5.0)
    put_off(instance.scheduler, "d", 20.0)
    firsts: list[str] = []
    made: dict[str, int] = {}
    for output in instance.run(lambda: not instance.scheduler.has_requests()):
        if output.new_token_ids and output.request_id not in made:
            firsts.append(output.request_id)
        made[output.request_id] = made.get(output.request_id, 0) + len(output.new_token_ids)
    assert made == dict.fromkeys("abcd", 4)
    assert firsts == ["a", "c", "b", "d"]


# --------------------------------------------------------------------------------------------- full KV


def full(blocks: int) -> Instance:
    """It has so many blocks of 16 tokens, and takes 16 prompt tokens into a step."""
    streams = {name: Stream([number] * 64) for number, name in enumerate("abcde", 20)}
    return Instance(0, Random(3), streams, overlap=False, chunk=16, blocks=blocks + 1)  # one is vLLM's own


def ask(instance: Instance, name: str, length: int, most: int = 20, **marks: Any) -> None:
    tokens = instance.streams[name].tokens[:length]
    instance.scheduler.add_request(request(name, tokens, most, Marks(**marks)))


def steps(instance: Instance, count: int) -> list[str]:
    """So many steps; who was preempted in them, in order."""
    gone: list[str] = []
    for _ in range(count):
        gone += sorted(instance.plan().preempted_req_ids or ())
        instance.take_in()
    return gone


def finished(instance: Instance) -> list[str]:
    """Run to the end; who ends, in order, each with a full answer."""
    outputs = instance.run(lambda: not instance.scheduler.has_requests())
    assert instance.faults == []
    return [output.request_id for output in outputs if output.finished]


def test_a_best_effort_decode_is_preempted_for_a_prompt() -> None:
    # Both fit with their prompts: 2 and 4 blocks. Then `a` needs a third one, and `b` its fourth.
    instance = full(blocks=6)
    ask(instance, "a", 31, by=50.0, best_effort=True)
    assert steps(instance, 2) == []
    ask(instance, "b", 64, by=1.0)
    assert steps(instance, 4) == ["a"]
    assert finished(instance) == ["b", "a"]


def test_without_best_effort_the_prompt_is() -> None:
    instance = full(blocks=6)
    ask(instance, "a", 31, by=1.0)
    assert steps(instance, 2) == []
    ask(instance, "b", 64, by=1.0)
    assert steps(instance, 4) == ["b"]
    assert finished(instance) == ["a", "b"]


@pytest.mark.parametrize(
    ("a", "b", "yields"),
    [
        ({}, {}, "b"),  # the younger one
        ({}, {"bound": True}, "a"),
        ({"bound": True}, {"bound": True}, "b"),
        ({"bound": True, "best_effort": True}, {}, "a"),
    ],
)
def test_of_two_decodes_that_is_preempted_which_may_be_best(
    a: dict[str, Any], b: dict[str, Any], yields: str
) -> None:
    # Both have 2 blocks, and need a third in the same step or the next.
    instance = full(blocks=4)
    ask(instance, "a", 16, by=1.0, **a)
    ask(instance, "b", 16, by=1.0, **b)
    assert steps(instance, 20) == [yields]
    assert finished(instance)[-1] == yields


def test_preempted_best_effort_lines_up_again() -> None:
    instance = full(blocks=4)
    ask(instance, "a", 16, by=50.0, best_effort=True)
    ask(instance, "b", 16, by=1.0)
    assert steps(instance, 3) == []
    ask(instance, "c", 48, by=9.0)
    assert steps(instance, 17) == ["a"]
    assert waiting(instance) == ["c", "a"]
    ask(instance, "d", 16, by=70.0)
    ask(instance, "e", 16, by=6.0)
    assert waiting(instance) == ["e", "c", "a", "d"]


def test_anybody_else_who_is_preempted_is_the_next_one() -> None:
    instance = full(blocks=4)
    ask(instance, "a", 16, by=1.0)
    ask(instance, "b", 16, by=1.0)
    assert steps(instance, 3) == []
    ask(instance, "c", 48, by=0.5)
    assert steps(instance, 17) == ["b"]
    assert waiting(instance) == ["b", "c"]
