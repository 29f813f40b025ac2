"""Who is shown to vLLM's scheduler for one step, and what holds in the steps after it."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from flowbench import Instance, Stream, request
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from taichi_serve.cluster.vllm.core.record import Step
from taichi_serve.cluster.vllm.wire import Marks

ONE = LoRARequest("one", 1, "/adapters/one")
TWO = LoRARequest("two", 2, "/adapters/two")


def with_adapter(made: Request, adapter: LoRARequest) -> Request:
    made.lora_request = adapter
    return made


@pytest.fixture
def instance() -> Instance:
    """It has a place for one adapter, and takes 16 prompt tokens into a step."""
    streams = {name: Stream([number] * 64) for number, name in enumerate("abcd", 20)}
    made = Instance(0, Random(3), streams, chunk=16)
    made.scheduler.lora_config = SimpleNamespace(max_loras=1)
    return made


def prompt(instance: Instance, name: str) -> list[int]:
    return instance.streams[name].tokens[:64]


def both_begin(instance: Instance) -> None:
    """A step that has 16 tokens of two prompts each, as where the slider of the chunk is moved."""
    engine = instance.scheduler
    engine.max_num_scheduled_tokens = 32
    engine.scheduler_config.long_prefill_token_threshold = 16
    schedule, engine._schedule = engine._schedule, lambda _: AsyncScheduler.schedule(engine)  # type: ignore[method-assign]
    engine._steps.append(Step(0.0, 32, 0, {}, []))
    assert instance.plan().num_scheduled_tokens == {"a": 16, "b": 16}
    engine._schedule = schedule  # type: ignore[method-assign]


def test_a_decode_that_moves_in_waits_while_a_prompt_behind_has_the_only_place(instance: Instance) -> None:
    engine = instance.scheduler
    engine.add_request(request("a", prompt(instance, "a"), 4))
    engine.add_request(with_adapter(request("b", prompt(instance, "b"), 4), ONE))
    both_begin(instance)  # from here on one of them alone is given the chunk
    engine.add_request(with_adapter(request("c", prompt(instance, "c"), 4, Marks(moved=True, output=1)), TWO))
    made: dict[str, int] = {}
    for output in instance.run(lambda: not engine.has_requests()):
        made[output.request_id] = made.get(output.request_id, 0) + len(output.new_token_ids)
    assert made == {"a": 4, "b": 4, "c": 4}


def test_two_that_move_in_with_adapters_of_their_own_go_one_after_the_other(instance: Instance) -> None:
    engine = instance.scheduler
    moved = Marks(moved=True, output=1)
    engine.add_request(with_adapter(request("a", prompt(instance, "a"), 4, moved), ONE))
    engine.add_request(with_adapter(request("b", prompt(instance, "b"), 4, moved), TWO))
    engine.add_request(with_adapter(request("c", prompt(instance, "c"), 4), ONE))
    engine.add_request(request("d", prompt(instance, "d"), 4))
    seen: set[int] = set()

    def over() -> bool:
        places = {r.lora_request.lora_int_id for r in engine.running if r.lora_request is not None}
        assert len(places) <= 1
        seen.update(places)
        return not engine.has_requests()

    outputs = instance.run(over)
    assert seen == {1, 2}
    assert {output.request_id for output in outputs if output.finish_reason is not None} == set("abcd")


def test_who_is_put_aside_for_an_adapter_keeps_its_place_in_the_queue(instance: Instance) -> None:
    engine = instance.scheduler
    for name, adapter in (("a", ONE), ("b", TWO), ("c", TWO)):
        engine.add_request(with_adapter(request(name, prompt(instance, name), 4), adapter))
    instance.plan()
    assert [waiting.request_id for waiting in engine.waiting] == ["b", "c"]


def test_a_second_request_of_a_name_that_is_here_does_not_end_the_engine(instance: Instance) -> None:
    engine = instance.scheduler
    for _ in range(2):
        engine.add_request(request("a", prompt(instance, "a"), 4))
    outputs = instance.run(lambda: not engine.has_requests())
    assert sum(len(output.new_token_ids) for output in outputs) == 4
