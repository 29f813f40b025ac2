"""The order in which a real vLLM scheduler takes waiting prompts in, by the places they were given."""

from __future__ import annotations

from random import Random

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
