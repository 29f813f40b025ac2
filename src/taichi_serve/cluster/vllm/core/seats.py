"""Who may be looked at when a step is put together: what vLLM's scheduler is not shown this time.

vLLM fills a step with running requests, then with waiting ones, until the budget is spent. Ours is spent in
another order: every decode, whoever moves in, then prompts. So for the time of one step some requests are
taken out of vLLM's queues; whatever vLLM concludes from who runs must hold with them counted in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from taichi_serve.cluster.vllm.core.grammar import is_built
from taichi_serve.cluster.vllm.core.marks import marks_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.request_queue import RequestQueue


def waits_for_kv(scheduler: AsyncScheduler, request: Request) -> bool:
    """Whether the request waits for KV that is not here yet."""
    if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
        return request.request_id not in scheduler.finished_recving_kv_req_ids
    return False


@contextlib.contextmanager
def aside(queue: RequestQueue, requests: list[Request]) -> Iterator[None]:
    """These waiting requests are not there for this step. They come back behind the others."""
    queue.remove_requests(requests)
    try:
        yield
    finally:
        for request in requests:
            queue.add_request(request)


def not_yet(scheduler: AsyncScheduler) -> list[Request]:
    """Who moves in and is not looked at in this step. While a grammar is being built vLLM would put its
    request behind new prompts. What is to be copied ahead and finds no room still runs at its source: nobody
    waits behind it."""
    pool = scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks() - scheduler._inflight_prefill_reserved_blocks()
    found = []
    for request in scheduler.kv_holding_waiting:
        if not is_built(request):
            found.append(request)
        elif marks_of(request).ahead and request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
            free -= -(-request.num_tokens // scheduler.block_size)
            if free < 0:
                found.append(request)
    return found


@contextlib.contextmanager
def room_for_moving_in(scheduler: AsyncScheduler, chunk: int) -> Iterator[None]:
    """Keep the part of the budget that is meant for moved-in requests out of the reach of prefills.

    Prefills that run already get `chunk` together, those behind sit this step out; and when they take all of
    it, no new one is admitted on the tokens that are left over.
    """
    taken, behind = 0, []
    for request in [r for r in scheduler.running if r.is_prefill_chunk]:
        if taken >= chunk:
            behind.append(request)
        taken += request.num_tokens - request.num_computed_tokens
    paused, limit = scheduler._pause_state, scheduler.max_num_active_reqs
    if behind:
        scheduler.running = [request for request in scheduler.running if request not in behind]
        scheduler.max_num_active_reqs -= len(behind)
    if taken >= chunk and paused == PauseState.UNPAUSED:
        scheduler._pause_state = PauseState.PAUSED_NEW
    try:
        yield
    finally:
        scheduler._pause_state, scheduler.max_num_active_reqs = paused, limit
        scheduler.running += behind


@contextlib.contextmanager
def only_with_a_place_for_its_adapter(scheduler: AsyncScheduler) -> Iterator[None]:
    """vLLM admits a request with a LoRA adapter while the step's adapters leave a place for its own, and
    counts those of the running requests that are in this very step. A later step has all of them, and vLLM
    ends if they are too many. So who waits is only shown where all that run leave a place."""
    if not scheduler.lora_config:
        yield
        return
    places = {_adapter(request) for request in scheduler.running} - {0}
    queues = scheduler.kv_holding_waiting, scheduler.waiting
    hidden = [_beyond(scheduler, queue, places) for queue in queues]
    for queue, requests in zip(queues, hidden, strict=True):
        queue.remove_requests(requests)
    try:
        yield
    finally:
        for queue, requests in zip(queues, hidden, strict=True):
            for request in reversed(requests):
                queue.prepend_request(request)


def _beyond(scheduler: AsyncScheduler, queue: RequestQueue, places: set[int]) -> list[Request]:
    """Requests of the queue whose adapter finds no place; those of the others are added to `places`."""
    found, most = [], scheduler.lora_config.max_loras
    for request in queue:
        if (adapter := _adapter(request)) == 0 or adapter in places:
            continue
        if len(places) >= most:
            found.append(request)
        elif not waits_for_kv(scheduler, request):
            places.add(adapter)
    return found


def _adapter(request: Request) -> int:
    return request.lora_request.lora_int_id if request.lora_request is not None else 0
