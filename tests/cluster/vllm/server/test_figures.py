"""vLLM's own statistics of a request that moved or was rescued: what one instance would have shown.

The outputs are made by hand, the front end that counts them is vLLM's.
"""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.engine import EngineCoreRequest as Request
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.metrics.stats import (
    FinishedRequestStats,
    IterationStats,
    PrefillStats,
    PrefixCacheStats,
    SchedulerStats,
)

from taichi_serve.cluster.vllm.server import figures

PROMPT = list(range(100, 120))  # 20 tokens, 16 of which are cached
QUEUED, SCHEDULED, PREEMPTED = EngineCoreEventType


def prefilled(local: int = 16, external: int = 0, prompt: int = 20) -> PrefillStats:
    stats = PrefillStats()
    stats.set(prompt, local, external)
    stats.finalize(16)
    return stats


def events(**at: float) -> list[EngineCoreEvent]:
    return [EngineCoreEvent(EngineCoreEventType[kind], when) for kind, when in at.items()]


def made(token: int, **more: Any) -> EngineCoreOutput:
    return EngineCoreOutput("a", [token], **more)


class FrontEnd:
    """vLLM's, with one request in it that was accepted at 100 s on the engines' clock."""

    def __init__(self) -> None:
        self.processor = OutputProcessor(None, log_stats=True)
        params = SamplingParams(max_tokens=9, detokenize=False)
        request = Request("a", PROMPT, None, params, None, time.time(), None, None, None)
        request.external_req_id = "a"
        self.processor.add_request(request, None)
        self.prompt_tokens = self.cached = self.external = self.first_tokens = self.gaps = 0
        self.finished: list[FinishedRequestStats] = []

    def take(self, output: EngineCoreOutput, at: float) -> None:
        stats = IterationStats()
        self.processor.process_outputs([output], at, stats)
        counted = stats.prompt_token_stats
        self.prompt_tokens += counted.total
        self.cached += counted.cached_tokens
        self.external += counted.external_kv_transfer
        self.first_tokens += len(stats.time_to_first_tokens_iter)
        self.gaps += len(stats.inter_token_latencies_iter)
        self.finished += stats.finished_requests

    def figures(self) -> dict[str, float]:
        (done,) = self.finished
        return {
            "prompt": self.prompt_tokens,
            "cached": self.cached,
            "external": self.external,
            "TTFTs": self.first_tokens,
            "gaps": self.gaps,
            "queued": done.queued_time,
            "prefill": done.prefill_time,
            "decode": done.decode_time,
            "inference": done.inference_time,
            "cached of it": done.num_cached_tokens,
            "preemptions": done.num_preemptions,
        }


LAST: dict[str, Any] = {"finish_reason": FinishReason.LENGTH}


def by_one_instance() -> dict[str, float]:
    """Queued at 100 s, scheduled at 101, tokens at 103, 104 and 105."""
    end = FrontEnd()
    end.take(made(1, events=events(QUEUED=100.0, SCHEDULED=101.0), prefill_stats=prefilled()), 103.0)
    end.take(made(2), 104.0)
    end.take(made(3, **LAST), 105.0)
    return end.figures()


def test_what_one_instance_shows_by_hand() -> None:
    assert by_one_instance() == {
        "prompt": 20,
        "cached": 16,
        "external": 0,
        "TTFTs": 1,
        "gaps": 2,
        "queued": 1.0,
        "prefill": 2.0,
        "decode": 2.0,
        "inference": 4.0,
        "cached of it": 16,
        "preemptions": 0,
    }


def test_a_request_that_moved_shows_what_one_instance_would() -> None:
    end = FrontEnd()
    output = made(1, events=events(QUEUED=100.0, SCHEDULED=101.0), prefill_stats=prefilled())
    figures.first(output, 0, 100.0)
    end.take(output, 103.0)
    # The target has it as a prompt of 21 tokens, all but one of which came over.
    moved = made(2, events=events(QUEUED=103.1, SCHEDULED=103.2), prefill_stats=prefilled(0, 20, 21))
    figures.later(moved)
    end.take(moved, 104.0)
    end.take(made(3, **LAST), 105.0)
    assert end.figures() == by_one_instance()


def test_a_request_that_was_rescued_before_its_first_token_was_queued_until_then() -> None:
    end = FrontEnd()
    output = made(1, events=events(QUEUED=100.8, SCHEDULED=101.0), prefill_stats=prefilled())
    figures.first(output, 1, 100.0)
    end.take(output, 103.0)
    end.take(made(2), 104.0)
    end.take(made(3, **LAST), 105.0)
    assert end.figures() == by_one_instance()


def test_without_the_correction_its_prefill_is_as_long_as_the_host_is_up() -> None:
    end = FrontEnd()
    end.take(made(1, **LAST), 103.0)
    assert end.finished[0].prefill_time == 103.0
    end, output = FrontEnd(), made(1, **LAST)
    figures.first(output, 2, 100.0)  # an engine that said nothing of when it began
    end.take(output, 103.0)
    assert (end.finished[0].queued_time, end.finished[0].prefill_time) == (0.0, 3.0)


def test_a_request_that_was_rescued_in_the_middle_shows_one_prefill() -> None:
    end = FrontEnd()
    end.take(made(1, events=events(QUEUED=100.0, SCHEDULED=101.0), prefill_stats=prefilled()), 103.0)
    again = made(2, events=events(QUEUED=103.1, SCHEDULED=103.2), prefill_stats=prefilled(16, 0, 21))
    figures.later(again)
    end.take(again, 104.0)
    end.take(made(3, **LAST), 105.0)
    assert end.figures() == by_one_instance()


def test_a_preemption_after_a_move_is_counted() -> None:
    end = FrontEnd()
    end.take(made(1, events=events(QUEUED=100.0, SCHEDULED=101.0), prefill_stats=prefilled()), 103.0)
    moved = made(2, events=events(QUEUED=103.1, SCHEDULED=103.2, PREEMPTED=103.3))
    figures.later(moved)
    end.take(moved, 104.0)
    end.take(made(3, **LAST), 105.0)
    assert end.figures() == {**by_one_instance(), "preemptions": 1}


def test_a_prefix_that_was_fetched_from_another_instance_of_ours_was_cached() -> None:
    end = FrontEnd()
    output = made(1, events=events(QUEUED=100.0, SCHEDULED=101.0), prefill_stats=prefilled(4, 12))
    prefill = figures.first(output, 0, 100.0, fetched=True)
    assert prefill == prefilled(16, 0)
    end.take(output, 103.0)
    end.take(made(2), 104.0)
    end.take(made(3, **LAST), 105.0)
    assert end.figures() == by_one_instance()
    stats = SchedulerStats(prefix_cache_stats=PrefixCacheStats())
    figures.looked_up(stats, [prefill])
    assert (stats.prefix_cache_stats.queries, stats.prefix_cache_stats.hits) == (20, 16)


def test_what_came_from_the_memory_of_its_host_is_external_to_its_prefix_cache() -> None:
    output = made(1, prefill_stats=prefilled(4, 12))
    prefill = figures.first(output, 0, 100.0)
    assert prefill == prefilled(4, 12)
    came = PrefixCacheStats(requests=7, queries=99, hits=1, reset=True)
    stats = SchedulerStats(prefix_cache_stats=PrefixCacheStats(), connector_prefix_cache_stats=came)
    figures.looked_up(stats, [prefill], offloads=True)
    assert (stats.prefix_cache_stats.queries, stats.prefix_cache_stats.hits) == (20, 4)
    assert stats.connector_prefix_cache_stats == PrefixCacheStats(
        requests=1, queries=16, hits=12, reset=True, hits_by_source={CacheHitSource.HOST: 12}
    )


def test_a_request_that_fails_without_a_token_was_queued_all_the_time() -> None:
    end = FrontEnd()
    journey: Any = SimpleNamespace(id="a", tokens=[], accepted_at=100.0)
    end.take(figures.failed(journey, 107.0), 107.0)
    (done,) = end.finished
    assert (done.queued_time, done.prefill_time, done.inference_time) == (7.0, 0.0, 0.0)


def test_a_request_is_looked_up_once_when_its_first_token_is_out() -> None:
    # Two legs were scheduled in the step: one that moved in, and one whose first token is out.
    told = PrefixCacheStats(requests=2, queries=41, hits=36, preempted_requests=1, reset=True)
    came = PrefixCacheStats(requests=2, queries=25, hits=20)
    stats = SchedulerStats(3, 4, prefix_cache_stats=told, connector_prefix_cache_stats=came)
    figures.looked_up(stats, [prefilled()])
    assert stats.prefix_cache_stats == PrefixCacheStats(
        requests=1, queries=20, hits=16, preempted_requests=1, reset=True
    )
    assert stats.connector_prefix_cache_stats is None
    assert (stats.num_running_reqs, stats.num_waiting_reqs) == (3, 4)
    figures.looked_up(stats, [])
    assert (stats.prefix_cache_stats.queries, stats.prefix_cache_stats.hits) == (0, 0)


def test_who_skips_the_prefix_cache_is_not_looked_up() -> None:
    request = Request("a", PROMPT, None, SamplingParams(), None, 0.0, None, None, None)
    assert figures.looks_up(request, caching=True)
    assert not figures.looks_up(request, caching=False)
    request.sampling_params = SamplingParams(prompt_logprobs=1)
    assert not figures.looks_up(request, caching=True)


def test_an_instance_that_was_lost_shows_zeros() -> None:
    outputs = figures.gone(2)
    assert (outputs.engine_index, outputs.outputs) == (2, [])
    assert outputs.scheduler_stats == SchedulerStats()
    assert replace(SchedulerStats(), num_running_reqs=3) != outputs.scheduler_stats
