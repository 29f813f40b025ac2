"""The scheduler inside every engine core, loaded by vLLM through `scheduler_cls`.

It adds four things to vLLM's own: a chunk that can change between two steps and does not count decodes;
decodes, and among them those that just moved in, always before prefills; a request that leaves after the
token it is on; and one small record of each step for the outside.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request, RequestStatus

from taichi_serve.cluster.vllm.heap import settle
from taichi_serve.cluster.vllm.kv import FlowConnectorScheduler

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats

# The stop reason of a leg that ended because the request goes on elsewhere. Users never see it.
LEFT = "taichi:left"
# Key of our entry in SamplingParams.extra_args, and in SchedulerStats.kv_connector_stats.
KEY = "taichi"
# A chunk of 0 keeps new prompts away by policy; what was preempted or lost its KV must still be computed.
RECOVERY_CHUNK = 128


class MovedIn(NamedTuple):
    """What became of a request that moved in, known when it is scheduled. Times are time.monotonic()."""

    reused: int  # tokens it need not compute: pulled, or still cached here
    pulled: int  # of these, from the instance before
    arrived: float  # it came here
    began: float  # its blocks were given and the pull was asked for
    landed: float  # the last byte was known to be here
    scheduled: float  # it went into a step


class Step(NamedTuple):
    """What one scheduled step holds, until its output is there."""

    scheduled_at: float
    prefill_tokens: int
    decodes: int
    moved_in: dict[str, list[float]]  # engine id: see MovedIn


def extra(request: Request) -> dict[str, Any]:
    """Our own entry in the request's sampling parameters: `hand_over`, or `moved` and `output`."""
    params = request.sampling_params
    return (params.extra_args or {}).get(KEY) or {} if params is not None else {}


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
        self._steps: deque[Step] = deque()
        self._arrived: dict[str, float] = {}  # requests that are moving in: when they came
        self._landed: dict[str, float] = {}  # and when their KV was here
        self._step: Step | None = None
        self._stepped_at = 0.0

    # ------------------------------------------------------------------------------ who is in the step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step: every decode, whoever moves in, then at most `chunk` prompt tokens."""
        # Decodes first: a prefill that was admitted earlier must not eat the share of a later decode.
        self.running.sort(key=_is_prefill)
        decodes = sum(not r.is_prefill_chunk for r in self.running)
        chunk = self.chunk or RECOVERY_CHUNK
        budget = chunk + decodes + len(self.kv_holding_waiting)
        self.max_num_scheduled_tokens = min(budget, self.scheduler_config.max_num_batched_tokens)
        self.scheduler_config.long_prefill_token_threshold = chunk
        at = time.monotonic()
        with self._room_for_moving_in(chunk):
            output = super().schedule(throttle_prefills)
        single = list(output.num_scheduled_tokens.values()).count(1)
        moved_in = self._moved_in(output, at) if output.scheduled_new_reqs else {}
        self._steps.append(Step(at, output.total_num_scheduled_tokens - single, single, moved_in))
        return output

    @contextlib.contextmanager
    def _room_for_moving_in(self, chunk: int) -> Iterator[None]:
        """Keep the part of the budget that is meant for moved-in requests out of the reach of prefills.

        Prefills that run already get `chunk` together, those behind sit this step out; and when they take
        all of it, no new one is admitted on the tokens that are left over.
        """
        if not self.kv_holding_waiting:
            yield
            return
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

    def _moved_in(self, output: SchedulerOutput, now: float) -> dict[str, list[float]]:
        moved_in: dict[str, list[float]] = {}
        for new in output.scheduled_new_reqs:
            if (arrived := self._arrived.pop(new.req_id, None)) is None:
                continue
            pulled, began = self._connector_scheduler.pulled.pop(new.req_id, (0, arrived))
            reused = new.num_computed_tokens
            landed = self._landed.pop(new.req_id, began)
            moved_in[new.req_id] = [reused, min(pulled, reused), arrived, began, landed, now]
        return moved_in

    def _update_from_kv_xfer_finished(self, kv_connector_output: Any) -> None:
        now = time.monotonic()
        for request_id in kv_connector_output.finished_recving or ():
            if request_id in self._arrived:
                self._landed[request_id] = now
        super()._update_from_kv_xfer_finished(kv_connector_output)

    def add_request(self, request: Request) -> None:
        """A request that moves in brings its output so far, where the runner can tell it from a prompt."""
        output = extra(request).get("output", 0)
        if output:
            self._arrived[request.request_id] = time.monotonic()
        if output and self.use_v2_model_runner:
            as_output(request, output)
        super().add_request(request)

    def _enqueue_waiting_request(self, request: Request) -> None:
        # A request that was already generating needs one token, so it never queues behind prefills.
        if extra(request).get("moved"):
            self.kv_holding_waiting.add_request(request)
        else:
            super()._enqueue_waiting_request(request)

    # ---------------------------------------------------------------------------------------- who leaves

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
        wanted = request.request_id in self._leaving or extra(request).get("hand_over")
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
        return super()._free_request(request, delay_free_blocks)

    # --------------------------------------------------------------------------------- what the step was

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """Take the step's tokens, and remember for make_stats which step this is."""
        self._step = self._steps.popleft()
        return super().update_from_output(scheduler_output, model_runner_output)

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
        pool = self.kv_cache_manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one block is vLLM's null block
        kv_tokens = used * self.block_size
        record = [now, now - began, step.prefill_tokens, step.decodes, kv_tokens, step.moved_in]
        stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), KEY: record}
        return stats


def _is_prefill(request: Request) -> bool:
    return bool(request.is_prefill_chunk)


def as_output(request: Request, count: int) -> None:
    """Turn the last `count` prompt tokens of a new request back into the output they are.

    vLLM's V2 model runner takes such a request as it takes one that resumes after a preemption, so seeds
    and penalties see what they would have seen without the move. The V1 runner cannot.
    """
    params = request.sampling_params
    assert params is not None and params.max_tokens is not None and request.prompt_token_ids is not None
    tokens = request.prompt_token_ids[-count:]
    request.prompt_token_ids = request.prompt_token_ids[:-count]
    request.num_prompt_tokens -= count
    del request._all_token_ids[-count:]
    request.append_output_token_ids(tokens)
    request.prefill_stats = None  # its prefill was counted elsewhere
    params.max_tokens += count
    params.min_tokens += extra(request)["min_tokens_done"]
    request.max_tokens = params.max_tokens


# --------------------------------------------------------- what the outside may call on the engine core


def _scheduler(core: EngineCore) -> FlowScheduler:
    return cast(FlowScheduler, core.scheduler)


def taichi_leave(core: EngineCore, request_ids: list[str]) -> None:
    """Utility call: see FlowScheduler.leave."""
    _scheduler(core).leave(request_ids)


def taichi_release(core: EngineCore, request_ids: list[str]) -> None:
    """Utility call: see FlowScheduler.release."""
    _scheduler(core).release(request_ids)


def taichi_chunk(core: EngineCore, chunk: int) -> None:
    """Utility call: at most `chunk` prompt tokens in each step from the next one on."""
    _scheduler(core).chunk = chunk


def taichi_settle(core: EngineCore) -> None:
    """Utility call: the engine core is warm."""
    settle()


# A utility call names a method of EngineCore; vLLM has no other way in (contract: tests/contract).
for _function in (taichi_leave, taichi_release, taichi_chunk, taichi_settle):
    setattr(EngineCore, _function.__name__, _function)
