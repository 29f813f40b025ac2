"""Prompts whose prefix is fetched from another instance's prefix cache before they are computed.

Such a prompt waits in its place of the queue. When little is left to compute before it, it is given the
blocks of the prefix, which belong to the copiers from then on, and waits beside the queue as vLLM has
requests wait for remote KV; others are scheduled meanwhile. When the server says that the blocks are here, or
that no more will come, they are the request's own, and the rest is computed like any prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from msgspec.structs import replace
from vllm.v1.request import Request, RequestStatus

from taichi_serve.cluster.vllm.core.grammar import is_built
from taichi_serve.cluster.vllm.core.marks import marks_of, remark
from taichi_serve.cluster.vllm.core.seats import waits_for_kv

if TYPE_CHECKING:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from taichi_serve.cluster.vllm.core.reads import Reads

NEAR = 2  # chunks of prompt tokens that are to be computed before a prompt when its prefix is sent for


def no_more(request: Request) -> None:
    """Nothing will be fetched for the request from here on: preempted, it is computed like any other."""
    if marks_of(request).fetch:
        remark(request, replace(marks_of(request), fetch=0))


class Fetches:
    """The prompts of one scheduler whose prefix is still to be sent for."""

    def __init__(self, scheduler: AsyncScheduler, reads: Reads) -> None:
        self._scheduler = scheduler
        self._reads = reads
        self._queued: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._queued)

    def came(self, request: Request) -> None:
        """A request is here; whether something is to be fetched for it is in its marks."""
        if marks_of(request).fetch:
            self._prune()
            self._queued[request.request_id] = request

    def _prune(self) -> None:
        here = ((leg, r) for leg, r in self._queued.items() if not r.is_finished())
        self._queued = {leg: request for leg, request in here if marks_of(request).fetch}

    # ------------------------------------------------------------------------------- what the server says

    def fetched(self, leg: str, blocks: int) -> None:
        """The first `blocks` blocks of the leg are here, nothing is written into any, and no more will come.
        They may be fewer than it was given for that."""
        request = self._scheduler.requests.get(leg)
        if request is None or request.is_finished():
            return  # its blocks are on their way back from the copiers
        given = self._reads.lent(leg)
        if given is None:
            no_more(request)
            return
        self._reads.over(leg)
        size = self._scheduler.block_size
        here = max(given.first, blocks) * size
        if here < request.num_computed_tokens:
            request.num_computed_tokens = here
            self._scheduler.failed_recving_kv_req_ids.add(leg)  # vLLM's word for: less came than was promised
            if request.prefill_stats is not None:
                own = given.first * size
                request.prefill_stats.set(request.num_prompt_tokens, own, here - own)
        self._scheduler.finished_recving_kv_req_ids.add(leg)

    def waive(self, leg: str) -> bool:
        """Have the leg computed without a fetch. False where blocks were given to it already: somebody may
        be writing into them."""
        if self._reads.lent(leg) is not None:
            return False
        request = self._scheduler.requests.get(leg)
        if request is not None:
            no_more(request)
        return True

    # ---------------------------------------------------------------------------------- within the queues

    @contextlib.contextmanager
    def in_turn(self, chunk: int) -> Iterator[None]:
        """For the time of one step: those that are near are looked at for blocks, whatever the prompts take
        of the budget; those whose prefix is here come behind requests that move in, before those if these
        find no room, as they have theirs, and sit out a step that running prompts fill."""
        scheduler, holding = self._scheduler, self._scheduler.kv_holding_waiting
        near = self._near(chunk) if self._queued else []
        beside = [request for request in holding if not marks_of(request).moved]
        if not near and not beside:
            yield
            return
        full = _to_compute(scheduler.running) >= chunk
        out = [request for request in beside if full and not waits_for_kv(scheduler, request)]
        scheduler.waiting.remove_requests(near)
        holding.remove_requests(beside)
        ready = [request for request in beside if request not in out]
        if self._fits(holding):
            for request in ready:
                holding.add_request(request)
        else:
            for request in reversed(ready):
                holding.prepend_request(request)
        for request in near:
            holding.add_request(request)
        try:
            yield
        finally:
            here = set(holding)
            back = [request for request in near if request in here and marks_of(request).fetch]
            holding.remove_requests(back)
            for request in reversed(back):  # there was no room, or no seat
                scheduler.waiting.prepend_request(request)
            for request in out:
                holding.add_request(request)

    def _fits(self, moving_in: Iterable[Request]) -> bool:
        """Whether there is room for all of these that have none yet."""
        scheduler = self._scheduler
        new = (r for r in moving_in if r.status != RequestStatus.WAITING_FOR_REMOTE_KVS)
        need = sum(-(-request.num_tokens // scheduler.block_size) for request in new)
        return bool(need <= scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def _near(self, chunk: int) -> list[Request]:
        """Those that wait with little before them and would find room."""
        scheduler = self._scheduler
        self._prune()
        found: list[Request] = []
        before = _to_compute(scheduler.running)
        pool = scheduler.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks() - scheduler._inflight_prefill_reserved_blocks()
        for request in scheduler.waiting:
            if before >= NEAR * chunk or len(found) == len(self._queued):
                break
            before += request.num_tokens
            if request.request_id in self._queued and is_built(request):
                free -= -(-request.num_tokens // scheduler.block_size)
                if free < 0:
                    break
                found.append(request)
        return found


def _to_compute(running: list[Request]) -> int:
    """Prompt tokens that running requests still need."""
    return sum(r.num_tokens - r.num_computed_tokens for r in running if r.is_prefill_chunk)
