"""The order in which an engine takes its waiting prompts in, and who goes first when its KV is full.

vLLM takes them in order of arrival. Ours have a place (marks, `by`): a prompt lines up before those with a
later place, and may be put off while it waits. What was computed before, preempted or fetched for, stays
where vLLM puts it, but for best effort: preempted, it lines up again, behind those that can be in time.

vLLM preempts the last of `running`, so they are sorted by the rule of preemption.py before each step.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, cast

from msgspec.structs import replace
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.request import Request, RequestStatus

from taichi_serve.cluster.vllm.core.marks import marks_of, remark
from taichi_serve.preemption import Rank, rank

if TYPE_CHECKING:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler


def line_up(scheduler: AsyncScheduler, request: Request) -> None:
    """A prompt takes its place among those that wait."""
    queue, by = cast(FCFSRequestQueue, scheduler.waiting), marks_of(request).by
    place = len(queue)
    while place and _may_be_overtaken(queue[place - 1]) and marks_of(queue[place - 1]).by > by:
        place -= 1
    queue.insert(place, request)


def line_up_again(scheduler: AsyncScheduler, legs: Collection[str]) -> None:
    """These were just preempted, and vLLM has put them before all others: best effort goes to its place."""
    waiting = [one for one in scheduler.waiting if one.request_id in legs] if legs else []
    for request in waiting:
        if marks_of(request).best_effort:
            scheduler.waiting.remove_request(request)
            line_up(scheduler, request)


def put_off(scheduler: AsyncScheduler, leg: str, by: float) -> None:
    """A prompt is best effort from now on; one that waits and has not begun takes another place."""
    request = scheduler.requests.get(leg)
    if request is None or request.is_finished() or request.sampling_params is None:
        return
    if request.sampling_params.extra_args is None:
        request.sampling_params.extra_args = {}
    remark(request, replace(marks_of(request), by=by, best_effort=True))
    if _may_be_overtaken(request) and request in cast(FCFSRequestQueue, scheduler.waiting):
        scheduler.waiting.remove_request(request)
        line_up(scheduler, request)


def in_running(request: Request) -> Rank:
    """Decodes before prompts, those that are bound here before both, and best effort behind all."""
    marks = marks_of(request)
    bound = marks.bound and bool(request.num_output_tokens)  # before its first token it can begin elsewhere
    return rank(best_effort=marks.best_effort, bound=bound, prompt=bool(request.is_prefill_chunk))


def _may_be_overtaken(request: Request) -> bool:
    if request.status == RequestStatus.PREEMPTED and not marks_of(request).best_effort:
        return False
    return not request.num_computed_tokens
