"""The scheduler inside every engine core, loaded by vLLM through `scheduler_cls`.

It adds to vLLM's own: a chunk that can change between two steps and does not count decodes; who just moved in
before all prefills; who loses its KV first; a request that leaves after the token it is on, whose full blocks
can be read before it does; one that has its blocks here before it comes; and a record of each step.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

from msgspec.structs import replace
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus

from taichi_serve.cluster.vllm.core.cached import CachedBlocks
from taichi_serve.cluster.vllm.core.connector import FlowConnectorScheduler
from taichi_serve.cluster.vllm.core.fetches import Fetches
from taichi_serve.cluster.vllm.core.flight import Flight
from taichi_serve.cluster.vllm.core.grammar import Grammars
from taichi_serve.cluster.vllm.core.loans import loans
from taichi_serve.cluster.vllm.core.marks import marks_of, remark
from taichi_serve.cluster.vllm.core.order import in_running, line_up, line_up_again
from taichi_serve.cluster.vllm.core.pins import Pins
from taichi_serve.cluster.vllm.core.prefixes import Prefixes
from taichi_serve.cluster.vllm.core.record import Arrivals, Step
from taichi_serve.cluster.vllm.core.resumed import as_output, go_on, keep_room
from taichi_serve.cluster.vllm.core.seats import (
    aside,
    not_yet,
    only_with_a_place_for_its_adapter,
    room_for_moving_in,
    waits_for_kv,
)
from taichi_serve.cluster.vllm.core.unconfirmed import Unconfirmed
from taichi_serve.cluster.vllm.wire import KEY, LEFT, UNREAD, flight_file

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats

log = logging.getLogger("vllm.taichi.scheduler")

# A chunk of 0 keeps new prompts away by policy; what was preempted or lost its KV must still be computed.
RECOVERY_CHUNK = 128


class FlowScheduler(AsyncScheduler):
    """vLLM's asynchronous scheduler with live chunks, moved-in decodes first, and requests that leave."""

    running: list[Request]
    max_num_active_reqs: int
    _pause_state: PauseState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.chunk: int = self.scheduler_config.max_num_batched_tokens
        # A cap of one chunk for each prefill keeps the budget's decode share out of its reach.
        self.adaptive_long_prefill_threshold = False
        self._side = cast(FlowConnectorScheduler, cast(Any, self.connector).connector_scheduler)
        self._reads = self._side.reads
        self._leaving: set[str] = set()
        self._unread: set[str] = set()  # requests of the step under way whose KV could not be read for it
        self._steps: deque[Step] = deque()
        self._step: Step | None = None
        self._in_step: dict[str, int] = {}  # the requests of it, and their tokens
        self._stepped_at = 0.0
        self._arrivals = Arrivals()
        self._pins = Pins(self.kv_cache_manager, self.block_size, self._reads)
        self._unconfirmed = Unconfirmed(self.kv_cache_manager, self._reads)
        self._grammars = Grammars(self.structured_output_manager)
        self.fetches = Fetches(self, self._reads)
        self.prefixes = Prefixes(self.kv_cache_manager, self._pins, self._steps, self.stays, loans(self))
        self.cached = CachedBlocks(self)
        directory = self._side.directory
        self._flight = Flight(flight_file(directory, self._side.engine_id)) if directory else None

    @property
    def stays(self) -> list[str]:
        """Why requests of this engine stay where they are; see groups.py."""
        return self._side.stays

    # ------------------------------------------------------------------------------ who is in the step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step: every decode, whoever moves in, then at most `chunk` prompt tokens."""
        queue, near = self.kv_holding_waiting, self.fetches.in_turn(self.chunk or RECOVERY_CHUNK)
        with aside(queue, not_yet(self)), only_with_a_place_for_its_adapter(self), near:
            output = self._schedule(throttle_prefills)
        if self._flight is not None:  # before it runs
            new = [request.req_id for request in output.scheduled_new_reqs]
            if self._steps[-1].prefill_tokens:
                new += [leg for leg, tokens in output.num_scheduled_tokens.items() if tokens > 1]
            self._flight.planned(new)
        return output

    def _schedule(self, throttle_prefills: bool) -> SchedulerOutput:
        # A prefill that was admitted earlier must not eat the share of a decode; the last is preempted first.
        self.running.sort(key=in_running)
        decodes = sum(not r.is_prefill_chunk for r in self.running)
        chunk = self.chunk or RECOVERY_CHUNK
        moving_in = sum(not waits_for_kv(self, request) for request in self.kv_holding_waiting)
        budget = chunk + decodes + moving_in
        self.max_num_scheduled_tokens = min(budget, self.scheduler_config.max_num_batched_tokens)
        self.scheduler_config.long_prefill_token_threshold = chunk
        at = time.monotonic()
        with room_for_moving_in(self, chunk) if moving_in else contextlib.nullcontext():
            output = super().schedule(throttle_prefills)
        line_up_again(self, output.preempted_req_ids or ())
        single = list(output.num_scheduled_tokens.values()).count(1)
        moved_in = self._arrivals.in_step(output, at, self._side.pulled)
        reading = [new.req_id for new in output.scheduled_new_reqs if new.req_id in self._reads]
        self._steps.append(Step(at, output.total_num_scheduled_tokens - single, single, moved_in, reading))
        return output

    def _update_from_kv_xfer_finished(self, kv_connector_output: Any) -> None:
        for leg in kv_connector_output.finished_recving or ():
            self._arrivals.landed(leg, time.monotonic())
        super()._update_from_kv_xfer_finished(kv_connector_output)
        self.prefixes.loaded()

    def add_request(self, request: Request) -> None:
        """A request that moves in brings its output so far, where the runner can tell it from a prompt."""
        ours = marks_of(request)
        here = self.requests.get(request.request_id)
        if here is not None and here.streaming_queue is None:  # vLLM's own would end the engine
            log.error("%s is here already: the second one is passed over", request.request_id)
            return
        if ours.ahead and self.stays:  # it is not here, and whoever asks hears so
            return
        if ours.output:
            self._arrivals.came(request.request_id, time.monotonic())
            if self.use_v2_model_runner:
                as_output(request, ours.output)
        if ours.reader:
            self._pins.follow(request, ours.reader)
        if ours.ahead:
            keep_room(request, ours.ahead)
        if ours.hand_over and not self.stays:
            self._leaving.add(request.request_id)  # its first token is its last one here
        super().add_request(request)
        self.fetches.came(request)

    def _enqueue_waiting_request(self, request: Request) -> None:
        # A request that was already generating needs one token, so it never queues behind prefills.
        if marks_of(request).moved:
            self.kv_holding_waiting.add_request(request)
        elif marks_of(request).by and request.status == RequestStatus.WAITING:
            line_up(self, request)
        else:
            super()._enqueue_waiting_request(request)

    def arrive(self, request_id: str, tokens: list[int]) -> bool:
        """A request whose blocks were copied ahead has left its source with these `tokens` since: it is in
        the next step. False where it never got its blocks, is not here, or its grammar does not take them."""
        request, now = self.requests.get(request_id), time.monotonic()
        if request is None or request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
            return False
        if self._reads.lent(request_id) is None or not self._grammars.go_on(request, tokens):
            return False
        go_on(request, tokens, self.use_v2_model_runner)
        # If it is preempted here, it is computed like any other.
        remark(request, replace(marks_of(request), ahead=0))
        self._side.arrive(request, now)
        request.num_computed_tokens = request.num_tokens - 1
        self._arrivals.came(request_id, now)
        self.finished_recving_kv_req_ids.add(request_id)
        return True

    # ---------------------------------------------------------------------------------------- who leaves

    def pin(self, request_id: str, reader: str) -> list[int] | None:
        """Full blocks of a request that runs here; they stay until `release`. None where it does not."""
        request = self.requests.get(request_id)
        if self.stays or request is None or request.is_finished():
            return None
        return self._pins.pin(request, reader)

    def leave(self, request_ids: Sequence[str]) -> None:
        """These requests stop after the token they are on, those that are here and can move."""
        if not self.stays:
            self._leaving.update(i for i in request_ids if self._runs(i))

    def release(self, legs: Sequence[str], readers: Sequence[str] = ()) -> tuple[int, float]:
        """Nobody reads any more from these `legs`, which left, or will, nor from what was pinned for these
        `readers`: their blocks are free again, those of legs once every worker has heard of it. What is not
        held is no error. Tokens of KV that are held then, and when that is (time.monotonic())."""
        for leg in legs:
            request = self.requests.get(leg)
            if request is not None and request.is_finished() and leg not in self._reads:
                self._side.release(leg)
        for reader in readers:
            self.prefixes.let_go(reader)
        return self._held_tokens(), time.monotonic()

    def drop(self, leg: str) -> Future[bool] | bool:
        """End this request here, if it is here. True once nothing is read from a peer for it any more, nor
        written into blocks here: at once, or when that is over. Its source may then be told to let go."""
        request = self.requests.get(leg)
        if request is not None and not request.is_finished():
            self._side.never_read(request)
            self.finish_requests(leg, RequestStatus.FINISHED_ABORTED)
        return self._reads.settled(leg)

    def _held_tokens(self) -> int:
        pool = self.kv_cache_manager.block_pool  # one block of it is vLLM's null block
        return int((pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) * self.block_size)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
        if request.request_id in self._leaving and new_token_ids and request.status == RequestStatus.RUNNING:
            self._side.leave(request)
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = LEFT
            stopped = True
        return new_token_ids, stopped

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        self._arrivals.forget(request.request_id)
        self._leaving.discard(request.request_id)
        self._pins.leave(request.request_id)
        return super()._free_request(request, delay_free_blocks)

    # --------------------------------------------------------------------------------- what the step was

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """Take the step's tokens, and remember for make_stats which step this is."""
        self._step, self._in_step = self._steps.popleft(), scheduler_output.num_scheduled_tokens
        step = self._step
        kv = model_runner_output.kv_connector_output
        struck = self._reads.struck(kv.invalid_block_ids if kv is not None else ())
        for leg in step.reading:
            if leg not in struck:  # what it read is certain from here on, before its token is looked at
                self._side.taken_in(leg, good=True, alive=self._runs(leg))
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        unread, self._unread = self._unread, set()
        for request in self.finish_requests(unread, RequestStatus.FINISHED_ERROR) if unread else ():
            output = EngineCoreOutput(
                request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=UNREAD
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
        for leg in struck.intersection(step.reading):
            self._side.taken_in(leg, good=False, alive=False)
        self.prefixes.step_over()
        return outputs

    def _runs(self, leg: str) -> bool:
        return (request := self.requests.get(leg)) is not None and not request.is_finished()

    def _handle_invalid_blocks(
        self, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]
    ) -> set[str]:
        """KV that was to be read within the step is not here: whoever counted on it ends, and begins anew.

        vLLM's own way, to compute the blocks again in place, takes back what was computed, but neither the
        placeholder of the token that did not come nor a step that is on its way: a wrong token comes out.
        It looks at running requests; ours may have been put back into the queue since the step was planned.
        """
        self.kv_cache_manager.evict_blocks(invalid_block_ids)  # whoever has them by now
        unread = super()._handle_invalid_blocks(invalid_block_ids, num_scheduled_tokens)
        for leg in self._reads.struck(invalid_block_ids):
            if self._runs(leg) and self.requests[leg].status != RequestStatus.WAITING_FOR_REMOTE_KVS:
                unread.add(leg)
        for leg in unread:
            (blocks,) = self.kv_cache_manager.get_block_ids(leg)
            first = next((i for i, block in enumerate(blocks) if block in invalid_block_ids), len(blocks))
            self.kv_cache_manager.evict_blocks(set(blocks[first:]))  # nor what was computed after them
        self._unread |= unread
        return unread

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """vLLM's own, which may take its blocks from every running request: not while a peer's KV is being
        read into any."""
        return False if len(self._reads) else super().reset_prefix_cache(*args, **kwargs)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's own statistics with our record of the step under KEY."""
        stats = super().make_stats(*args, **kwargs)
        step, self._step = self._step, None
        if stats is None or step is None:
            return stats
        here = (self.requests[i] for i in self._in_step if i in self.requests)  # looked at for prompts only
        news = self._pins.news(r for r in here if not r.is_finished()) if step.prefill_tokens else {}
        record = step.told(self._stepped_at, self._held_tokens(), news, self.cached)
        if step.prefill_tokens or step.decodes:
            self._stepped_at = record.made
        stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), KEY: record}
        return stats
