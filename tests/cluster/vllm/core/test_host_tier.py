"""KV that is offloaded to the host beside moves: who loads, what is stored, and what is told of it."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

pytest.importorskip("vllm")

from flowbench import BLOCK, Instance, Stream, first_hash, request, told
from vllm.v1.request import RequestStatus

from taichi_serve.cluster.vllm.wire import Given, Marks

PROMPT = list(range(100, 100 + 3 * BLOCK + 3))  # three full blocks


class Here:
    """One instance with 24 blocks and a host with room for as many as `host`."""

    def __init__(self, host: int = 40, **streams: list[int]) -> None:
        known = {"a": PROMPT, "b": PROMPT, **streams}
        self.instance = Instance(
            0, Random(1), {name: Stream(tokens) for name, tokens in known.items()}, blocks=25, host=host
        )
        self.scheduler = self.instance.scheduler
        self.tier = self.scheduler.connector.host_tier

    def compute(self, name: str, tokens: list[int] | None = None, most: int = 1, **more: Any) -> Any:
        """Have it computed to its end; its outputs."""
        self.scheduler.add_request(request(name, PROMPT if tokens is None else tokens, most, **more))
        return self.run(lambda: not self.scheduler.requests)

    def run(self, until: Any) -> Any:
        """Until that, and until nothing is stored any more."""
        found = self.instance.run(lambda: until() and not self.busy())
        assert self.instance.faults == []
        return found

    def busy(self) -> bool:
        return bool(self.instance.steps or self.instance.worked or self.scheduler.has_requests())

    def forget(self) -> None:
        """The device loses its prefix cache."""
        assert self.scheduler.reset_prefix_cache()
        self.run(lambda: True)


def blocks_of(tokens: list[int]) -> set[int]:
    return {told(one) for one in request("hashes", tokens, 1).block_hashes}


def prefilled(outputs: Any) -> tuple[int, int]:
    """Tokens of a prompt that were in the prefix cache, and that came from the host."""
    stats = outputs[0].prefill_stats
    return stats.num_local_cached_tokens, stats.num_external_cached_tokens


def test_what_was_computed_is_stored_with_the_answer_and_told() -> None:
    here = Here()
    here.compute("a", most=2 * BLOCK)
    whole = here.instance.streams["a"].tokens[: len(PROMPT) + 2 * BLOCK]
    # The last token has no KV.
    assert here.instance.believed_host == blocks_of(whole[:-1])
    assert len(here.instance.believed_host) == 5


def test_a_prompt_loads_what_the_device_lost_and_says_the_same() -> None:
    here = Here()
    first = here.compute("a", most=20)
    here.forget()
    again = here.compute("b", most=20)
    assert [one.new_token_ids for one in again] == [one.new_token_ids for one in first]
    assert (prefilled(first), prefilled(again)) == ((0, 0), (0, 3 * BLOCK))


def test_the_host_fills_up_behind_what_the_device_still_has() -> None:
    here = Here()
    here.compute("a")
    pool = here.scheduler.kv_cache_manager.block_pool
    second = request("hashes", PROMPT, 1).block_hashes[1]
    pool.evict_blocks({pool.get_cached_block(second, [0])[0].block_id})
    assert prefilled(here.compute("b")) == (BLOCK, 2 * BLOCK)


def test_the_last_token_is_computed_into_a_block_of_its_own() -> None:
    exact = PROMPT[: 3 * BLOCK]
    here = Here(a=exact, b=exact)
    here.compute("a", exact)
    here.forget()
    assert prefilled(here.compute("b", exact)) == (0, 2 * BLOCK)


def test_the_one_longest_unused_makes_room_and_is_told_as_removed() -> None:
    others = {f"o{i}": [1000 * i + 9] * (2 * BLOCK + 1) for i in range(1, 4)}
    here = Here(host=6, **others)
    for name, tokens in others.items():
        here.compute(name, tokens)
    here.compute("a")
    assert len(here.instance.believed_host) == 6
    assert here.instance.believed_host >= blocks_of(PROMPT)
    assert here.instance.believed_host.isdisjoint(blocks_of(others["o1"]))


def test_a_prompt_that_fetches_does_not_ask_the_host() -> None:
    here = Here()
    here.compute("a")
    here.forget()
    here.scheduler.add_request(request("b", PROMPT, 1, Marks(fetch=2)))
    here.instance.plan()
    given = here.scheduler._reads.lent("b")
    assert given is not None
    assert (given.first, len(given.blocks)) == (0, 2)
    assert here.tier._scheduler._current_batch_load_jobs == {}
    here.scheduler.fetches.fetched("b", 0)
    here.instance.take_in()
    here.run(lambda: not here.scheduler.requests)


def test_what_is_not_certain_yet_is_not_stored_and_what_went_wrong_never() -> None:
    here = Here()
    one = request("a", PROMPT, 1)
    here.scheduler.add_request(one)
    status = here.tier._scheduler._req_status["a"]
    here.scheduler._reads.begin(Given("a", [1, 2, 3, 4], 1))
    here.tier.bound(["a", "unheard of"])
    assert status.max_offload_tokens == BLOCK
    here.tier.ends(one)
    assert status.max_offload_tokens == BLOCK
    here.scheduler._reads.over("a")
    here.tier.bound(["a"])
    assert status.max_offload_tokens is None
    one.status = RequestStatus.FINISHED_ERROR
    here.tier.ends(one)
    assert status.max_offload_tokens == 0


@pytest.mark.parametrize(
    ("marks", "room"),
    [(Marks(moved=True, output=1, ahead=32), 6), (Marks(fetch=3), 4)],
    ids=["copied ahead", "fetched"],
)
def test_what_is_still_to_be_stored_of_blocks_is_stored_before_a_leg_of_ours_gets_them(
    marks: Marks, room: int
) -> None:
    here = Here()
    here.scheduler.add_request(request("a", PROMPT, 1))
    here.instance.plan()
    was = set(here.scheduler.kv_cache_manager.get_block_ids("a")[0])
    here.instance.take_in()  # it is over, and its blocks are anybody's
    assert "a" not in here.scheduler.requests
    pool = here.scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - room)
    here.scheduler.add_request(request("b", [7, *PROMPT], 1, marks))
    step = here.instance.plan()
    given = here.scheduler._reads.lent("b")
    assert given is not None
    assert was & set(given.blocks)
    _, offloading = step.kv_connector_metadata.metadata
    assert offloading.jobs_to_flush
    here.instance.take_in()
    copies = here.instance.host.copies  # type: ignore[union-attr]
    assert not copies.stores
    assert here.instance.seen["waited for"] > 0
    pool.free_blocks(taken)


def test_a_load_is_a_read_that_whoever_drops_its_request_waits_for() -> None:
    here = Here()
    here.compute("a")
    here.forget()
    here.scheduler.add_request(request("b", PROMPT, 1))
    here.instance.plan()
    assert here.scheduler.requests["b"].status == RequestStatus.WAITING_FOR_REMOTE_KVS
    answer = here.scheduler.drop("b")
    assert answer is not True
    here.scheduler.release(["b"])  # it never left: nothing is given back twice
    assert not here.scheduler.reset_prefix_cache()
    here.run(lambda: not here.scheduler.requests)
    assert answer.result(0)
    assert here.instance.used() == 0


def test_who_asks_again_and_a_reset_of_the_tier_are_told_from_the_beginning() -> None:
    here = Here()
    here.compute("a")
    here.scheduler.cached.follow(first_hash())
    here.run(lambda: True)
    assert here.instance.believed_host == blocks_of(PROMPT)
    assert here.scheduler.reset_prefix_cache(reset_connector=True)
    assert here.scheduler.has_requests()  # an idle engine makes a step to say it
    here.run(lambda: True)
    assert here.instance.believed_host == set()
    assert prefilled(here.compute("b")) == (0, 0)


def test_the_tier_may_be_emptied_twice_between_two_steps() -> None:
    here = Here()
    here.scheduler.add_request(request("a", PROMPT, 1))
    here.instance.plan()
    here.instance.take_in()
    assert here.scheduler.connector.has_pending_push_work(), "something is being stored"
    for _ in range(2):
        assert here.scheduler.reset_prefix_cache(reset_connector=True)
    here.run(lambda: True)
    assert here.instance.believed_host == set()


def test_a_prompt_whose_kv_is_here_goes_before_a_request_that_moves_in_and_finds_no_room() -> None:
    here = Here(host=40, c=[9] * 40)
    here.compute("a")
    here.forget()
    pool = here.scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 4)
    here.scheduler.add_request(request("b", PROMPT, 1))
    here.instance.run(lambda: "b" in here.scheduler.finished_recving_kv_req_ids)
    here.scheduler.add_request(request("c", [9] * 40, 2, Marks(moved=True, output=1)))
    step = here.instance.plan()
    assert list(step.num_scheduled_tokens) == ["b"]
    here.instance.take_in()
    pool.free_blocks(taken)
    here.run(lambda: not here.scheduler.requests)


def test_without_the_flag_nothing_of_it_is_there() -> None:
    here = Instance(0, Random(1), {"a": Stream(PROMPT)})
    assert type(here.scheduler.connector).__name__ == "FlowConnector"
    assert here.scheduler.cached.take_host() is None


# ------------------------------------------------------------------------------------------ lent to others


def asked(here: Here, count: int = 3) -> Any:
    hashes = [bytes(one) for one in request("hashes", PROMPT, 1).block_hashes[:count]]
    return here.scheduler.prefixes.ask("r", hashes)


def device_has(here: Here, blocks: list[int]) -> list[int]:
    pool = here.scheduler.kv_cache_manager.block_pool
    return [told(pool.blocks[one].block_hash) for one in blocks]


def test_a_prefix_that_only_the_host_has_is_loaded_before_it_is_lent() -> None:
    here = Here()
    here.compute("a")
    here.forget()
    answer = asked(here)
    assert not answer.done()
    here.run(answer.done)
    assert set(device_has(here, answer.result())) == blocks_of(PROMPT)
    stream = here.instance.streams["a"]
    assert here.instance.slots[answer.result()[1]] == stream.hashes[BLOCK : 2 * BLOCK]
    assert here.scheduler.requests == {}
    assert here.instance.used() == 3  # pinned
    here.scheduler.release([], ["r"])
    assert here.instance.used() == 0


def test_what_the_device_has_of_it_is_not_loaded() -> None:
    here = Here()
    here.compute("a")
    pool = here.scheduler.kv_cache_manager.block_pool
    last = request("hashes", PROMPT, 1).block_hashes[2]
    pool.evict_blocks({pool.get_cached_block(last, [0])[0].block_id})
    answer = asked(here)
    here.instance.plan()
    (job,) = here.instance.steps[-1][0].kv_connector_metadata.metadata[1].load_jobs.values()
    assert len(job.dst_spec.block_ids) == 1
    here.run(answer.done)
    assert len(answer.result()) == 3


def test_what_the_host_lost_since_it_was_asked_is_never_computed() -> None:
    here = Here()
    here.compute("a")
    here.forget()
    answer = asked(here)
    here.tier._scheduler.manager._policy.clear()
    here.run(answer.done)
    assert answer.result() == []
    assert here.instance.cached() == set()


def test_where_those_who_run_need_the_room_nothing_is_loaded_for_others() -> None:
    here = Here()
    here.compute("a")
    here.forget()
    pool = here.scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 3)
    assert asked(here) == []
    pool.free_blocks(taken)


def test_a_loan_that_nobody_waits_for_any_more_is_given_up() -> None:
    here = Here()
    here.compute("a")
    here.forget()
    answer = asked(here)
    here.instance.plan()
    here.scheduler.release([], ["r"])
    assert answer.result(0) == []
    here.run(lambda: not here.scheduler.requests)
    assert here.instance.used() == 0
    assert len(here.scheduler.prefixes._loans) == 0


def test_statistics_of_both_connectors_come_back_as_what_they_were() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

    from taichi_serve.cluster.vllm.tiered import TieredConnector

    ours, host = NixlKVConnectorStats(), OffloadingConnectorStats()
    host.increase_counter("vllm:kv_offload_load_bytes", 5)
    data = {"FlowConnector": ours.to_dict(), "OffloadingConnector": host.to_dict()}
    found = TieredConnector.build_kv_connector_stats(data)
    assert found is not None
    assert found.to_dict() == data
    assert not found.is_empty()
    assert TieredConnector.build_kv_connector_stats().is_empty()  # type: ignore[union-attr]
