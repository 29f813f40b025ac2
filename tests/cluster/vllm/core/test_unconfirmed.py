"""What is read, and may yet turn out not to have been, is found by nobody in the prefix cache."""

from __future__ import annotations

from random import Random

import pytest

pytest.importorskip("vllm")

from flowbench import BLOCK, Instance, Stream, abort, reads_directly, request

from taichi_serve.cluster.vllm.wire import LEFT, UNREAD, Marks

PROMPT = [7] * 40
SAME = [7] * 41  # its first two blocks are those of PROMPT


class Reader:
    """Request `a` has left its source, and this target reads its KV within the step that needs it."""

    def __init__(self, fails: bool, overlap: bool = True) -> None:
        reads_directly(1, 0, True)
        streams = {"a": Stream(PROMPT), "b": Stream(SAME)}
        source = Instance(0, Random(1), streams)
        self.here = Instance(1, Random(2), streams, overlap=overlap)
        self.here.peers = {0: source, 1: self.here}
        self.here.failing = float(fails)
        source.scheduler.add_request(request("a", PROMPT, 10, Marks(hand_over=True)))
        (last,) = source.run(lambda: source.scheduler.get_num_unfinished_requests() == 0)
        assert last.stop_reason == LEFT
        tokens = [*PROMPT, *last.new_token_ids]
        marks = Marks(moved=True, output=1)
        self.here.scheduler.add_request(request("a#1", tokens, 9, marks, last.kv_transfer_params))

    def asks_for_the_same(self) -> int:
        """Tokens that a request with the same beginning finds in the cache."""
        scheduler = self.here.scheduler
        scheduler.add_request(request("b", SAME, 10))
        output = self.here.plan()
        (new,) = output.scheduled_new_reqs
        assert new.req_id == "b"
        return new.num_computed_tokens


def test_while_the_step_that_reads_is_under_way_nobody_finds_its_blocks() -> None:
    reader = Reader(fails=False)
    reader.here.plan()
    assert reader.asks_for_the_same() == 0


def test_once_the_step_was_taken_in_they_are_found() -> None:
    reader = Reader(fails=False)
    reader.here.plan()
    (output,) = reader.here.take_in()
    assert output.new_token_ids
    assert reader.asks_for_the_same() == 2 * BLOCK


def test_what_could_not_be_read_is_never_found() -> None:
    reader = Reader(fails=True)
    reader.here.plan()
    (output,) = reader.here.take_in()
    assert (output.stop_reason, output.new_token_ids) == (UNREAD, [])
    assert reader.asks_for_the_same() == 0


def test_not_even_where_the_leg_was_aborted_before_it_was_known() -> None:
    reader = Reader(fails=True)
    reader.here.plan()
    abort(reader.here, "a#1")
    assert reader.here.take_in() == []
    assert reader.asks_for_the_same() == 0


def test_a_step_that_was_planned_meanwhile_caches_nothing_and_its_token_goes_nowhere() -> None:
    reader = Reader(fails=True)
    reader.here.plan()
    reader.here.plan()
    (output,) = reader.here.take_in()
    assert output.stop_reason == UNREAD
    assert reader.here.take_in() == []
    assert reader.asks_for_the_same() == 0


def test_an_invalid_block_leaves_the_cache_whoever_has_it() -> None:
    reader = Reader(fails=False)
    reader.here.plan()
    reader.here.take_in()
    scheduler = reader.here.scheduler
    (blocks,) = scheduler.kv_cache_manager.get_block_ids("a#1")
    abort(reader.here, "a#1")
    scheduler._handle_invalid_blocks({blocks[0]}, {})
    assert reader.asks_for_the_same() == 0
