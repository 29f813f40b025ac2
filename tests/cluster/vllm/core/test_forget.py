"""An engine whose server is gone ends what it has under way, and holds nothing for anybody."""

from __future__ import annotations

from concurrent.futures import Future
from random import Random

import pytest

pytest.importorskip("vllm")

from flowbench import Instance, Stream, reads_directly, request

from taichi_serve.cluster.vllm.core.forget import let_go, stop, stopped
from taichi_serve.cluster.vllm.wire import Again, Given, Marks, Return

PROMPT = [7] * 40  # two full blocks and a half
OTHER = [9] * 40
THIRD = [8] * 40


def instance(index: int = 0) -> Instance:
    made = Instance(
        index, Random(index), {"a": Stream(PROMPT), "b": Stream(OTHER), "c": Stream(THIRD)}, overlap=True
    )
    made.peers = {index: made}
    return made


def orders(one: Instance) -> list[Again | Given | Return]:
    """What the copiers hear next."""
    return list(one.scheduler._side._orders)


def empty(one: Instance) -> bool:
    return not one.scheduler.requests and not one.scheduler._held_tokens()


def test_prompts_decodes_and_those_that_left_are_gone_after_the_next_steps() -> None:
    one = instance()
    one.scheduler.add_request(request("a", PROMPT, 10, Marks(hand_over=True)))
    one.run(lambda: one.scheduler.get_num_unfinished_requests() == 0)  # it left, and is held for a reader
    one.scheduler.add_request(request("b", OTHER, 100))
    one.run(lambda: one.scheduler.requests["b"].num_output_tokens > 2)
    one.scheduler.add_request(request("c", THIRD, 100))
    assert one.scheduler.pin("b", "reader") is not None
    assert not empty(one)
    stop(one.scheduler)
    assert orders(one)[-1] == Again()
    assert stopped(one.scheduler) is True
    one.run(lambda: len(one.scheduler.requests) == 1)  # what somebody may read stays until all have stopped
    assert one.scheduler._held_tokens() > 0
    let_go(one.scheduler)
    one.run(lambda: empty(one))


def test_blocks_that_somebody_writes_into_come_back_when_that_is_over_and_nobody_is_told() -> None:
    source, target = instance(0), instance(1)
    reads_directly(1, 0, False)
    for one in (source, target):
        one.peers = {0: source, 1: target}
    target.scheduler.add_request(request("a#1+", [*PROMPT, 5], 9, Marks(moved=True, output=1, ahead=8)))
    target.run(lambda: target.scheduler._reads.lent("a#1+") is not None)
    asked = target.scheduler.drop("a#1+")
    assert isinstance(asked, Future)
    stop(target.scheduler)
    rests = stopped(target.scheduler)
    assert isinstance(rests, Future) and not rests.done()
    target.run(rests.done)
    let_go(target.scheduler)
    target.run(lambda: empty(target))
    assert not asked.done()  # who asked is not there any more


def test_a_request_that_comes_afterwards_is_served_from_the_prefix_cache_that_stayed() -> None:
    one = instance()
    one.scheduler.add_request(request("a", PROMPT, 3))
    one.run(lambda: one.scheduler.get_num_unfinished_requests() == 0)
    stop(one.scheduler)
    let_go(one.scheduler)
    one.run(lambda: empty(one))
    one.scheduler.add_request(request("a", PROMPT, 3))
    outputs = one.run(lambda: one.scheduler.get_num_unfinished_requests() == 0)
    tokens = [token for output in outputs for token in output.new_token_ids]
    assert tokens == one.streams["a"].tokens[40:43]
