"""A prompt fetches the first blocks of its KV from another instance's prefix cache, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from math import ceil
from random import Random

import pytest

pytest.importorskip("vllm")

from flowbench import BLOCK, Instance, Stream, abort, reads_directly, request
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import RequestStatus

from taichi_serve.cluster.vllm.core.prefixes import SPARE
from taichi_serve.cluster.vllm.wire import Marks

PREFIX = list(range(100, 100 + 3 * BLOCK))
PROMPT = [*PREFIX, *[7] * 10]  # three full blocks, and a part of one
TARGET, SOURCE = 1, 0


class Pair:
    """A source that has computed the prompt before, and an idle target."""

    def __init__(self, overlap: bool = True, **shape: int) -> None:
        reads_directly(TARGET, SOURCE, True)
        self.streams = {name: Stream(PROMPT) for name in ("before", "a", "after")}
        self.streams |= {f"b{k}": Stream([9 + k] * 40) for k in range(8)}
        self.source = Instance(SOURCE, Random(1), self.streams, overlap)
        self.target = Instance(TARGET, Random(2), self.streams, overlap, **shape)
        for one in (self.source, self.target):
            one.peers = {SOURCE: self.source, TARGET: self.target}
        self.hashes = [bytes(one) for one in request("hashes", PROMPT, 1).block_hashes]
        self.complete(self.source, "before")
        while self.source.steps or self.source.worked:
            self.source.take_in()

    def complete(self, here: Instance, name: str) -> EngineCoreOutput:
        """Compute a prompt and one token of it; its output."""
        here.scheduler.add_request(request(name, self.streams[name].tokens[: len(PROMPT)], 1))
        return self.ends(here, name)

    def ends(self, here: Instance, name: str, earlier: Sequence[EngineCoreOutput] = ()) -> EngineCoreOutput:
        """Step until a request is over, and see that its tokens are the true ones; its first output."""
        outputs = [*earlier, *here.run(lambda: name not in here.scheduler.requests)]
        mine = [one for one in outputs if one.request_id == name]
        made = [token for one in mine for token in one.new_token_ids]
        prompt = len(PROMPT) if name in ("before", "a", "after") else 40
        assert made == self.streams[name].tokens[prompt : prompt + len(made)]
        assert made
        return mine[0]

    def ask(self, blocks: int = 3) -> Future[list[int]] | list[int]:
        """Ask the source what it has for request `a`."""
        return self.source.scheduler.prefixes.ask("a", self.hashes[:blocks])

    def begin(self, fetch: int = 3) -> None:
        """Request `a` comes to the target, and its prefix is to come after it."""
        self.target.scheduler.add_request(request("a", PROMPT, 3, Marks(fetch=fetch)))

    def copy(self) -> int:
        """What the source has is copied; how many blocks that is."""
        found = self.ask()
        assert isinstance(found, list)
        self.target.copier.inbox.append(("more", "a", SOURCE, found, "", True))
        self.target.run(lambda: ("landed", "a") in self.target.copier.words)
        return len(found)

    @property
    def waits(self) -> bool:
        """Whether request `a` has blocks at the target and waits for KV."""
        status = self.target.scheduler.requests["a"].status
        return bool(status == RequestStatus.WAITING_FOR_REMOTE_KVS)


def cached(output: EngineCoreOutput) -> tuple[int, int]:
    """Tokens of its prompt that were found here, and that came from elsewhere."""
    stats = output.prefill_stats
    assert stats is not None
    return stats.num_local_cached_tokens, stats.num_external_cached_tokens


@pytest.mark.parametrize("overlap", [True, False])
def test_what_was_fetched_is_not_computed_again_and_is_in_the_cache_for_those_who_come_later(
    overlap: bool,
) -> None:
    pair = Pair(overlap)
    pair.begin()
    blocks = pair.copy()
    pair.target.scheduler.fetches.fetched("a", blocks)
    assert cached(pair.ends(pair.target, "a")) == (0, 48)
    assert cached(pair.complete(pair.target, "after")) == (48, 0)


def test_while_it_is_fetched_others_are_computed_and_find_none_of_it() -> None:
    pair = Pair()
    pair.begin()
    pair.target.run(lambda: pair.waits)
    pair.complete(pair.target, "b0")
    assert cached(pair.complete(pair.target, "after")) == (0, 0)
    assert pair.waits


def test_where_less_came_the_rest_is_computed() -> None:
    pair = Pair()
    pair.begin()
    pair.hashes = pair.hashes[:1]
    assert pair.copy() == 1
    pair.target.scheduler.fetches.fetched("a", 1)
    assert cached(pair.ends(pair.target, "a")) == (0, 16)


@pytest.mark.parametrize("given", [True, False])
def test_where_nothing_comes_all_of_it_is_computed(given: bool) -> None:
    pair = Pair()
    pair.begin()
    if given:
        pair.target.run(lambda: pair.waits)
    pair.target.scheduler.fetches.fetched("a", 0)
    assert cached(pair.ends(pair.target, "a")) == (0, 0)


def test_a_fetch_can_be_waived_until_it_has_blocks() -> None:
    pair = Pair()
    pair.begin()
    assert pair.target.scheduler.fetches.waive("a")
    assert cached(pair.ends(pair.target, "a")) == (0, 0)
    pair = Pair()
    pair.begin()
    pair.target.run(lambda: pair.waits)
    assert not pair.target.scheduler.fetches.waive("a")
    assert pair.target.scheduler.fetches.waive("nobody")


def test_what_its_own_cache_has_is_not_sent_for() -> None:
    pair = Pair()
    pair.complete(pair.target, "after")
    pair.begin()
    assert cached(pair.ends(pair.target, "a")) == (48, 0)


def test_of_a_prompt_of_full_blocks_the_last_is_computed() -> None:
    pair = Pair()
    pair.target.scheduler.add_request(request("a", PREFIX, 1, Marks(fetch=3)))
    pair.target.run(lambda: pair.waits)
    given = pair.target.scheduler._reads.lent("a")
    assert given is not None
    assert len(given.blocks) == 2


def test_it_is_sent_for_when_little_is_left_to_compute_before_it() -> None:
    pair = Pair(chunk=16)
    for k in range(4):  # 40 prompt tokens each, 16 in a step
        pair.target.scheduler.add_request(request(f"b{k}", pair.streams[f"b{k}"].tokens[:40], 1))
    pair.begin()
    pair.target.plan()
    assert not pair.waits
    pair.target.run(lambda: pair.waits)
    assert "b3" in pair.target.scheduler.requests, "it waited until it was the first"
    blocks = pair.copy()
    pair.target.scheduler.fetches.fetched("a", blocks)
    assert cached(pair.ends(pair.target, "a")) == (0, 48)


def test_a_prompt_for_whose_prefix_there_is_no_room_keeps_its_place_and_nobody_is_harmed() -> None:
    pair = Pair(blocks=6)  # five to give: the first prompt takes three, and one for its output
    pair.target.scheduler.add_request(request("b0", pair.streams["b0"].tokens[:40], 12))
    pair.target.plan()
    pair.begin()
    pair.ends(pair.target, "b0")
    pair.target.run(lambda: pair.waits)
    blocks = pair.copy()
    pair.target.scheduler.fetches.fetched("a", blocks)
    assert cached(pair.ends(pair.target, "a")) == (0, 48)


def test_when_it_is_aborted_its_blocks_are_free_once_nobody_writes_into_them() -> None:
    pair = Pair()
    pair.begin()
    pair.target.run(lambda: pair.waits)
    abort(pair.target, "a")
    assert pair.target.used() == 3
    pair.target.run(lambda: pair.target.used() == 0)
    pair.target.scheduler.fetches.fetched("a", 3)  # what was on its way does no harm


def test_a_preempted_prompt_fetches_nothing_a_second_time() -> None:
    pair = Pair()
    pair.begin()
    blocks = pair.copy()
    pair.target.scheduler.fetches.fetched("a", blocks)
    pair.target.run(lambda: pair.target.scheduler.requests["a"].status == RequestStatus.RUNNING)
    outputs = pair.target.take_in()
    running = pair.target.scheduler.requests["a"]
    pair.target.scheduler.running.remove(running)
    pair.target.scheduler._preempt_request(running, 0.0)
    pair.target.scheduler.kv_cache_manager.evict_blocks(set(range(64)))  # it finds nothing of it either
    pair.ends(pair.target, "a", outputs)


# ------------------------------------------------------------------------------------------- at the source


def test_what_a_reader_was_shown_stays_until_it_is_let_go() -> None:
    pair = Pair()
    assert pair.source.used() == 0
    found = pair.ask()
    assert isinstance(found, list)
    assert (len(found), pair.source.used()) == (3, 3)
    pair.source.scheduler.release([], ["a"])
    assert pair.source.used() == 0


def test_nothing_is_pinned_where_those_who_run_need_the_room() -> None:
    pair = Pair()
    pool = pair.source.scheduler.kv_cache_manager.block_pool
    # Three blocks are cached and unused; one in twenty of all is to stay free beside them.
    keep = 3 + ceil(SPARE * pool.num_gpu_blocks)
    in_use = pool.get_new_blocks(pool.get_num_free_blocks() - keep)
    assert pair.ask() != []
    pair.source.scheduler.release([], ["a"])
    (one,) = pool.get_new_blocks(1)
    assert pair.ask() == []
    pool.free_blocks([*in_use, one])
    assert pair.ask() != []


def test_a_gap_ends_what_is_found() -> None:
    pair = Pair()
    second = pair.ask()
    assert isinstance(second, list)
    pair.source.scheduler.release([], ["a"])
    pair.source.scheduler.kv_cache_manager.evict_blocks({second[1]})
    assert pair.ask() == second[:1]


def test_blocks_that_a_step_under_way_still_fills_are_shown_when_it_is_over() -> None:
    pair = Pair()
    pair.source.scheduler.kv_cache_manager.reset_prefix_cache()
    pair.source.scheduler.add_request(request("after", PROMPT, 1))
    pair.source.plan()
    answer = pair.ask()
    assert isinstance(answer, Future)
    assert not answer.done()
    pair.source.take_in()
    assert len(answer.result(0)) == 3


def test_a_block_that_left_the_cache_before_the_answer_does_not_count() -> None:
    pair = Pair()
    pair.source.scheduler.kv_cache_manager.reset_prefix_cache()
    pair.source.scheduler.add_request(request("after", PROMPT, 1))
    pair.source.plan()
    answer = pair.ask()
    assert isinstance(answer, Future)
    (blocks,) = pair.source.scheduler.kv_cache_manager.get_block_ids("after")
    pair.source.scheduler.kv_cache_manager.evict_blocks({blocks[1]})
    pair.source.take_in()
    assert answer.result(0) == blocks[:1]


def test_who_does_not_want_it_any_more_is_shown_nothing() -> None:
    pair = Pair()
    pair.source.scheduler.kv_cache_manager.reset_prefix_cache()
    pair.source.scheduler.add_request(request("after", PROMPT, 1))
    pair.source.plan()
    answer = pair.ask()
    pair.source.scheduler.release([], ["a"])
    pair.source.take_in()
    assert isinstance(answer, Future)
    assert answer.result(0) == []


# -------------------------------------------------------------------------------------- moves copy no more


def test_a_move_copies_only_what_its_target_does_not_have() -> None:
    pair = Pair()
    pair.complete(pair.target, "after")  # it has the three full blocks
    pair.source.scheduler.add_request(request("a", PROMPT, 30))
    pair.source.run(lambda: pair.source.scheduler.requests["a"].num_output_tokens == 3)
    blocks = pair.source.scheduler.pin("a", "a#1")
    assert blocks is not None
    made = list(pair.source.scheduler.requests["a"].output_token_ids)
    marks = Marks(moved=True, output=len(made), ahead=8)
    pair.target.scheduler.add_request(request("a#1", [*PROMPT, *made], 20, marks))
    pair.target.copier.inbox.append(("more", "a#1", SOURCE, blocks, "", False))
    pair.target.run(lambda: ("copied", "a#1") in pair.target.copier.words)
    given = pair.target.scheduler._reads.lent("a#1")
    assert given is not None
    assert given.first == 3
    assert pair.target.copier.legs["a#1"].done == 3
