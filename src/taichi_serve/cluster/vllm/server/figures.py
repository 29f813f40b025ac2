"""vLLM's statistics of a request that moved or was rescued, made those that one instance would have shown.

vLLM's front end takes times from the events of the engine that made the first token, and counts prompts and
prefix cache look-ups of every engine. Here a request has several legs: each is queued, scheduled and looked
up anew, and an engine that dies takes its events along. So the front end hears of a prefill once, with the
output that is the request's first, and everything about later legs is left out.

These are functions of what an engine said: nothing here knows of connections or other requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.metrics.stats import PrefillStats, PrefixCacheStats, SchedulerStats

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.server.journey import Journey

QUEUED, SCHEDULED = EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED


def first(
    output: EngineCoreOutput, leg: int, accepted_at: float, fetched: bool = False
) -> PrefillStats | None:
    """Correct the first output that the front end gets of a request; gives what was prefilled for it.

    On leg 0 that is what the engine says. A later leg began when its first instance was lost, and the time
    since the request was `accepted_at` (`time.monotonic()`) is time in which it was queued: without that,
    vLLM would take the time since the host was started. With `fetched` a prefix of it came from another
    instance; else what is not from its own prefix cache is from the memory of its host, which vLLM calls
    external, too.
    """
    if leg > 0:
        events = [event for event in output.events or () if event.type != QUEUED]
        if not any(event.type == SCHEDULED for event in events):
            events.insert(0, EngineCoreEvent.new_event(SCHEDULED, accepted_at))
        output.events = [EngineCoreEvent.new_event(QUEUED, accepted_at), *events]
    prefilled = output.prefill_stats
    if prefilled is not None and fetched:
        # What a prompt got from another instance of ours was in the prefix cache there.
        prefilled.num_local_cached_tokens += prefilled.num_external_cached_tokens
        prefilled.num_external_cached_tokens = 0
    return prefilled


def later(output: EngineCoreOutput) -> None:
    """Correct any output after the first: it was neither queued nor prefilled again, but may be preempted."""
    output.prefill_stats = None
    if output.events:
        output.events = [event for event in output.events if event.type != QUEUED] or None


def failed(journey: Journey, now: float) -> EngineCoreOutput:
    """The end of a request with an error. If it never had a token, all its time was spent in the queue."""
    since = () if journey.tokens else ((QUEUED, journey.accepted_at), (SCHEDULED, now))
    events = [EngineCoreEvent.new_event(kind, at) for kind, at in since]
    return EngineCoreOutput(journey.id, [], finish_reason=FinishReason.ERROR, events=events or None)


def looks_up(request: EngineCoreRequest, caching: bool) -> bool:
    """Whether vLLM looks this request up in the prefix cache, where `caching` says that there is one."""
    params = request.sampling_params
    return caching and not (params is not None and params.skip_reading_prefix_cache)


def looked_up(stats: SchedulerStats, prefills: Iterable[PrefillStats], offloads: bool = False) -> None:
    """Make the look-ups in the prefix cache those of `prefills`, whose first tokens came with these `stats`.

    An engine counts a look-up for every leg, and one that died has counted those that are made again
    elsewhere. What comes over in a move is no hit in somebody else's cache. A request is counted when its
    first token is out; one that ends before that is not. An engine that `offloads` looks for the rest in the
    memory of its host.
    """
    told = stats.prefix_cache_stats
    counted = PrefixCacheStats(
        reset=told.reset,
        preempted_requests=told.preempted_requests,
        preempted_queries=told.preempted_queries,
        preempted_hits=told.preempted_hits,
    )
    outside = stats.connector_prefix_cache_stats
    host = PrefixCacheStats(reset=outside is not None and outside.reset)
    for prefill in prefills:
        tokens, local = prefill.num_prompt_tokens, prefill.num_local_cached_tokens
        counted.record(tokens, local, preempted=False)
        loaded = prefill.num_external_cached_tokens
        host.record(tokens - local, loaded, False, {CacheHitSource.HOST: loaded})
    stats.prefix_cache_stats = counted
    stats.connector_prefix_cache_stats = host if offloads else None


def gone(index: int) -> EngineCoreOutputs:
    """What an instance that was lost shows from then on: nothing runs and nothing waits."""
    return EngineCoreOutputs(engine_index=index, scheduler_stats=SchedulerStats())
