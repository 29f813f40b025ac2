"""What a target is asked before its source may let go, and that a source holds until it is told."""

from __future__ import annotations

from concurrent.futures import Future
from random import Random

import pytest

pytest.importorskip("vllm")

from flowbench import BLOCK, Instance, Stream, reads_directly, request
from vllm.v1.request import RequestStatus

from taichi_serve.cluster.vllm.core.calls import CALLS
from taichi_serve.cluster.vllm.wire import LEFT, UNREAD, Call, Marks, TransferParams

PROMPT = [7] * 40  # two full blocks and a half
OTHER = [9] * 40
TARGET, SOURCE = 1, 0


class Pair:
    """A source where request `a` has left after its first token, and an idle target."""

    def __init__(self, directly: bool = False) -> None:
        reads_directly(TARGET, SOURCE, directly)
        self.streams = {"a": Stream(PROMPT), "b": Stream(OTHER)}
        self.source = Instance(SOURCE, Random(1), self.streams)
        self.target = Instance(TARGET, Random(2), self.streams)
        for one in (self.source, self.target):
            one.peers = {SOURCE: self.source, TARGET: self.target}
        self.params, self.token = self.leave("a")

    def leave(self, name: str) -> tuple[TransferParams, int]:
        """Prefill there, and hand over."""
        self.source.scheduler.add_request(request(name, PROMPT, 10, Marks(hand_over=True)))
        outputs = self.source.run(lambda: self.source.scheduler.get_num_unfinished_requests() == 0)
        (last,) = (output for output in outputs if output.request_id == name)
        assert last.stop_reason == LEFT and last.kv_transfer_params is not None
        return last.kv_transfer_params, last.new_token_ids[0]  # type: ignore[return-value]

    def next_leg(self, name: str = "a#1") -> None:
        marks = Marks(moved=True, output=1)
        self.target.scheduler.add_request(request(name, [*PROMPT, self.token], 9, marks, self.params))

    def ahead(self, name: str = "a#1+") -> None:
        marks = Marks(moved=True, output=1, ahead=8)
        self.target.scheduler.add_request(request(name, [*PROMPT, self.token], 9, marks))


def waits(answer: Future[bool] | bool) -> bool:
    return isinstance(answer, Future) and not answer.done()


def said(answer: Future[bool] | bool) -> bool:
    return answer.result(0) if isinstance(answer, Future) else answer


def test_a_leg_that_is_not_here_is_dropped_at_once() -> None:
    assert Pair().target.scheduler.drop("nobody") is True


def test_a_leg_that_still_waits_is_dropped_at_once_and_nothing_is_ever_read_for_it() -> None:
    pair = Pair()
    pair.next_leg()
    assert pair.target.scheduler.drop("a#1") is True
    pair.target.run(lambda: not pair.target.scheduler.has_requests())
    assert pair.target.seen == {}
    assert pair.source.early == set()  # nor is the source told that its blocks were read


def test_a_leg_that_is_read_over_nixl_is_dropped_when_that_read_is_over() -> None:
    pair = Pair()
    pair.next_leg()
    pair.target.stuck = True
    pair.target.run(lambda: bool(pair.target.pulls))
    answer = pair.target.scheduler.drop("a#1")
    for _ in range(20):  # an engine without other work keeps asking its worker
        assert pair.target.scheduler.has_requests() and waits(answer)
        pair.target.step()
    pair.target.stuck = False
    pair.target.run(lambda: not waits(answer))
    assert said(answer) and pair.target.used() == 0


def test_a_leg_that_is_read_within_its_step_is_dropped_when_the_step_is_taken_in() -> None:
    pair = Pair(directly=True)
    pair.next_leg()
    target = pair.target
    assert target.plan().num_scheduled_tokens == {"a#1": 1}
    answer = target.scheduler.drop("a#1")
    assert waits(answer)
    target.take_in()
    assert said(answer) and target.used() == 0


def test_a_leg_that_is_copied_ahead_is_dropped_when_the_copier_has_returned_its_blocks() -> None:
    pair = Pair()
    pair.ahead()
    target = pair.target
    target.stuck = True
    target.copier.inbox.append(("more", "a#1+", SOURCE, pair.params["remote_block_ids"][0][:2], "", False))
    target.run(lambda: any(leg.reading for leg in target.copier.legs.values()))
    answer = target.scheduler.drop("a#1+")
    for _ in range(20):
        target.step()
        target.copier.turn()
    assert waits(answer) and target.used() == 4  # 41 tokens and room for 8
    target.stuck = False
    target.run(lambda: not waits(answer))
    assert said(answer) and target.used() == 0 and target.faults == []


def test_dropping_twice_is_answered_twice() -> None:
    pair = Pair()
    pair.next_leg()
    pair.target.stuck = True
    pair.target.run(lambda: bool(pair.target.pulls))
    answers = [pair.target.scheduler.drop("a#1"), pair.target.scheduler.drop("a#1")]
    pair.target.stuck = False
    pair.target.run(lambda: not any(map(waits, answers)))
    assert all(map(said, answers))


def test_a_source_holds_what_left_until_it_is_told() -> None:
    pair = Pair()
    held = pair.source.used()
    assert held == 3
    for _ in range(50):
        pair.source.step()
    assert pair.source.held["a"] > 3600 * 24 * 365  # seconds that its worker would wait by itself
    assert pair.source.used() == held
    pair.source.scheduler.release(["a", "nobody"], ["nobody"])
    pair.source.run(lambda: pair.source.used() == 0)
    tokens, _ = pair.source.scheduler.release(["a"])
    assert tokens == 0


def test_one_call_lets_go_of_what_left_and_of_what_was_pinned() -> None:
    pair = Pair()
    source = pair.source
    source.scheduler.add_request(request("b", OTHER, 10))
    source.run(lambda: source.scheduler.requests["b"].num_output_tokens > 1)
    assert len(source.scheduler.pin("b", "b#1+") or ()) == 2
    source.scheduler.drop("b")
    source.run(lambda: source.used() == 3 + 2)
    tokens, _ = source.scheduler.release(["a"], ["b#1+"])
    source.run(lambda: source.used() == 0)
    assert tokens == 3 * BLOCK  # what left goes with the next step


def test_blocks_that_are_being_read_are_shown_to_no_reader() -> None:
    pair = Pair(directly=True)
    pair.next_leg()
    target = pair.target
    target.plan()
    assert target.scheduler.pin("a#1", "a#2+") == []
    target.take_in()
    assert len(target.scheduler.pin("a#1", "a#2+") or ()) == 2


def test_a_leg_whose_tail_did_not_come_keeps_its_blocks_until_the_copier_returns_them() -> None:
    pair = Pair()
    pair.ahead()
    target = pair.target
    target.run(lambda: bool(target.copier.legs))
    target.stuck = True
    blocks = list(pair.params["remote_block_ids"][0])
    target.copier.inbox.append(("more", "a#1+", SOURCE, blocks, "a", False))
    target.run(lambda: any(leg.reading for leg in target.copier.legs.values()))
    assert target.scheduler.arrive("a#1+", [])
    outputs = target.run(lambda: "a#1+" not in {r.request_id for r in target.scheduler.running}, 3)
    outputs += target.run(target.scheduler.requests["a#1+"].is_finished, 10)
    assert [output.stop_reason for output in outputs] == [UNREAD]
    for _ in range(20):
        target.step()
    assert target.scheduler.requests["a#1+"].status == RequestStatus.FINISHED_ERROR
    assert target.used() == 4
    target.stuck = False
    target.run(lambda: target.used() == 0)
    assert target.faults == []


def test_every_call_is_a_method_of_the_engine_core() -> None:
    assert set(CALLS) == set(Call)
