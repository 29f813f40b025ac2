"""The scheduler inside every engine core, loaded by vLLM through `scheduler_cls`.

It adds to vLLM's own: a chunk that can change between two steps and does not count decodes; decodes, and
among them those that just moved in, always before prefills; a request that leaves after the token it is on,
whose full blocks can be read before it does; one that has its blocks here before it comes; and a small record
of each step.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from msgspec.structs import replace
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus

from taichi_serve.cluster.vllm.core.connector import FlowConnectorScheduler
from taichi_serve.cluster.vllm.core.marks import marks_of, remark
from taichi_serve.cluster.vllm.core.pins import Pins
from taichi_serve.cluster.vllm.core.resumed import as_output, go_on, keep_room
from taichi_serve.cluster.vllm.wire import KEY, LEFT, UNREAD, MovedIn, Record

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats

# A chunk of 0 keeps new prompts away by policy; what was preempted or lost its KV must still be computed.
RECOVERY_CHUNK = 128


class Step(NamedTuple):
    """What one scheduled step holds, until its output is there."""

    scheduled_at: float
    prefill_tokens: int
    decodes: int
    moved_in: dict[str, MovedIn]  # by engine id


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
        self._leaving: set[str] = set()
        self._unread: set[str] = set()  # requests of the step under way whose KV could not be read for it
        self._steps: deque[Step] = deque()
        self._arrived: dict[str, float] = {}  # requests that are moving in: when they came
        self._landed: dict[str, float] = {}  # and when their KV was here
        self._step: Step | None = None
        self._in_step: dict[str, int] = {}  # the requests of it, and their tokens
        self._stepped_at = 0.0
        self._before = 0.0  # when the last step with anything in it was scheduled
        self._pins = Pins(self.kv_cache_manager, self.block_size)

    # ------------------------------------------------------------------------------ who is in the step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step: every decode, whoever moves in, then at most `chunk` prompt tokens."""
        with self._without_those_that_do_not_fit():
            return self._schedule(throttle_prefills)

    def _schedule(self, throttle_prefills: bool) -> SchedulerOutput:
        # Decodes first: a prefill that was admitted earlier must not eat the share of a later decode.
        self.running.sort(key=_is_prefill)
        decodes = sum(not r.is_prefill_chunk for r in self.running)
        chunk = self.chunk or RECOVERY_CHUNK
        moving_in = sum(not self._blocked(request) for request in self.kv_holding_waiting)
        budget = chunk + decodes + moving_in
        self.max_num_scheduled_tokens = min(budget, self.scheduler_config.max_num_batched_tokens)
        self.scheduler_config.long_prefill_token_threshold = chunk
        at = time.monotonic()
        with self._room_for_moving_in(chunk) if moving_in else contextlib.nullcontext():
            output = super().schedule(throttle_prefills)
        single = list(output.num_scheduled_tokens.values()).count(1)
        moved_in = self._moved_in(output, at) if output.scheduled_new_reqs else {}
        self._before = at if output.total_num_scheduled_tokens else self._before
        self._steps.append(Step(at, output.total_num_scheduled_tokens - single, single, moved_in))
        return output

    def _blocked(self, request: Request) -> bool:
        """Whether it waits for KV that is not here yet."""
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            return request.request_id not in self.finished_recving_kv_req_ids
        return False

    @contextlib.contextmanager
    def _without_those_that_do_not_fit(self) -> Iterator[None]:
        """What is to be copied ahead and finds no room still runs at its source: nobody waits behind it."""
        free = (
            self.kv_cache_manager.block_pool.get_num_free_blocks() - self._inflight_prefill_reserved_blocks()
        )
        aside = []
        for request in self.kv_holding_waiting:
            if marks_of(request).ahead and request.status == RequestStatus.WAITING:
                free -= -(-request.num_tokens // self.block_size)
                if free < 0:
                    aside.append(request)
        self.kv_holding_waiting.remove_requests(aside)
        try:
            yield
        finally:
            for request in aside:
                self.kv_holding_waiting.add_request(request)

    @contextlib.contextmanager
    def _room_for_moving_in(self, chunk: int) -> Iterator[None]:
        """Keep the part of the budget that is meant for moved-in requests out of the reach of prefills.

        Prefills that run already get `chunk` together, those behind sit this step out; and when they take
        all of it, no new one is admitted on the tokens that are left over.
        """
        taken, behind = 0, []
        for request in [r for r in self.running if r.is_prefill_chunk]:
            if taken >= chunk:
                behind.append(request)
            taken += request.num_tokens - request.num_computed_tokens
        paused, limit = self._pause_state, self.max_num_active_reqs
        if behind:
            self.running = self.running[: len(self.running) - len(behind)]
            self.max_num_active_reqs -= len(behind)
        if taken >= chunk and paused == PauseState.UNPAUSED:
            self._pause_state = PauseState.PAUSED_NEW
        try:
            yield
        finally:
            self._pause_state, self.max_num_active_reqs = paused, limit
            self.running += behind

    def _moved_in(self, output: SchedulerOutput, now: float) -> dict[str, MovedIn]:
        moved_in: dict[str, MovedIn] = {}
        for new in output.scheduled_new_reqs:
            if (arrived := self._arrived.pop(new.req_id, None)) is None:
                continue
            pulled, began = self._connector_scheduler.pulled.pop(new.req_id, (0, arrived))
            reused = new.num_computed_tokens
            landed = self._landed.pop(new.req_id, began)
            self._connector_scheduler.scheduled(new.req_id)
            moved_in[new.req_id] = MovedIn(
                reused, min(pulled, reused), arrived, began, landed, self._before, now
            )
        return moved_in

    def _update_from_kv_xfer_finished(self, kv_connector_output: Any) -> None:
        now = time.monotonic()
        for request_id in kv_connector_output.finished_recving or ():
            if request_id in self._arrived:
                self._landed[request_id] = now
        super()._update_from_kv_xfer_finished(kv_connector_output)

    def add_request(self, request: Request) -> None:
        """A request that moves in brings its output so far, where the runner can tell it from a prompt."""
        ours = marks_of(request)
        output = ours.output
        if output:
            self._arrived[request.request_id] = time.monotonic()
        if output and self.use_v2_model_runner:
            as_output(request, output)
        if ours.reader:
            self._pins.follow(request, ours.reader)
        if ours.ahead:
            keep_room(request, ours.ahead)
        super().add_request(request)

    def _enqueue_waiting_request(self, request: Request) -> None:
        # A request that was already generating needs one token, so it never queues behind prefills.
        if marks_of(request).moved:
            self.kv_holding_waiting.add_request(request)
        else:
            super()._enqueue_waiting_request(request)

    def arrive(self, request_id: str, tokens: list[int]) -> bool:
        """A request whose blocks were copied ahead has left its source with these `tokens` since: it is in
        the next step. False where it never got its blocks, or is not here."""
        request, now = self.requests.get(request_id), time.monotonic()
        if request is None or request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
            return False
        go_on(request, tokens, self.use_v2_model_runner)
        remark(
            request, replace(marks_of(request), ahead=0)
        )  # if it is preempted here, it is computed like any other
        if not self._connector_scheduler.arrive(request, now):
            return False
        request.num_computed_tokens = request.num_tokens - 1
        self._arrived[request_id] = now
        self.finished_recving_kv_req_ids.add(request_id)
        return True

    # ---------------------------------------------------------------------------------------- who leaves

    def pin(self, request_id: str, reader: str) -> list[int] | None:
        """Blocks of a request that runs here which are full and stay until `unpin(reader)`; None where it
        does not run, or its KV is of several kinds."""
        request = self.requests.get(request_id)
        return self._pins.pin(request, reader) if request is not None and not request.is_finished() else None

    def unpin(self, reader: str) -> tuple[int, float]:
        """The blocks that were pinned for this leg are read no more. Tokens of KV that are held then, and
        when that is: an engine without work makes no step that would tell."""
        self._pins.unpin(reader)
        return self._held_tokens(), time.monotonic()

    def _held_tokens(self) -> int:
        pool = self.kv_cache_manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one block is vLLM's null block
        return int(used * self.block_size)

    def leave(self, request_ids: list[str]) -> None:
        """These requests stop after the token they are on; ids that are not here are dropped."""
        self._leaving.update(i for i in request_ids if i in self.requests)

    def release(self, request_ids: list[str]) -> None:
        """Free the blocks of requests that left and that nobody will read."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None and request.is_finished():
                self._connector_scheduler.release(request_id)

    @property
    def _connector_scheduler(self) -> FlowConnectorScheduler:
        return cast(FlowConnectorScheduler, cast(Any, self.connector).connector_scheduler)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
        wanted = request.request_id in self._leaving or marks_of(request).hand_over
        if wanted and not stopped and new_token_ids and request.status == RequestStatus.RUNNING:
            self._connector_scheduler.leave(request)
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = LEFT
            stopped = True
        return new_token_ids, stopped

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        for memory in (self._arrived, self._landed):
            memory.pop(request.request_id, None)
        self._leaving.discard(request.request_id)
        self._pins.leave(request.request_id)
        return super()._free_request(request, delay_free_blocks)

    # --------------------------------------------------------------------------------- what the step was

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """Take the step's tokens, and remember for make_stats which step this is."""
        self._step, self._in_step = self._steps.popleft(), scheduler_output.num_scheduled_tokens
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        unread, self._unread = self._unread, set()
        for request in self.finish_requests(unread, RequestStatus.FINISHED_ERROR) if unread else ():
            output = EngineCoreOutput(
                request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=UNREAD
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
        return outputs

    def _handle_invalid_blocks(
        self, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]
    ) -> set[str]:
        """KV that was to be read within the step is not here: whoever counted on it ends, and begins anew.

        vLLM's own way, to compute the blocks again in place, takes back what was computed, but neither the
        placeholder of the token that did not come nor a step that is on its way: a wrong token comes out.
        """
        unread = super()._handle_invalid_blocks(invalid_block_ids, num_scheduled_tokens)
        for request_id in unread:
            (blocks,) = self.kv_cache_manager.get_block_ids(request_id)
            first = next(i for i, block in enumerate(blocks) if block in invalid_block_ids)
            self.kv_cache_manager.evict_blocks(set(blocks[first:]))  # the prefix cache must not give them out
        self._unread |= unread
        return unread

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's own statistics with our record of the step under KEY."""
        stats = super().make_stats(*args, **kwargs)
        step, self._step = self._step, None
        if stats is None or step is None:
            return stats
        now = time.monotonic()
        began = max(step.scheduled_at, self._stepped_at)
        if step.prefill_tokens or step.decodes:
            self._stepped_at = now
        held = self._held_tokens()
        here = (self.requests[i] for i in self._in_step if i in self.requests)  # looked at for prompts only
        news = self._pins.news(r for r in here if not r.is_finished()) if step.prefill_tokens else {}
        record = Record(now, now - began, step.prefill_tokens, step.decodes, held, step.moved_in, news)
        stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), KEY: record}
        return stats


def _is_prefill(request: Request) -> bool:
    return bool(request.is_prefill_chunk)
