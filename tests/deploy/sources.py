"""Where expressions stand: the board, the rules, and the boards that vLLM publishes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/taichi.json").read_text(encoding="utf-8"))
RULES: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text(encoding="utf-8"))

PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]

# What appears with a flag only, and so not in every scrape.
WITH_A_FLAG = {
    "taichi_slo_used": "--autotune",
    "taichi_attainment": "--autotune",
    "taichi_host_blocks": "--kv-offloading-size",
    "taichi_front_end_serves": "--api-server-count",
    "taichi_front_end_requests": "--api-server-count",
    "taichi_front_end_restarts_total": "--api-server-count",
    "taichi_link_moves_total": "--ray",
    "taichi_link_moved_tokens_total": "--ray",
    "taichi_link_gap_seconds_total": "--ray",
    "taichi_link_refused_total": "--ray",
    "taichi_link_price": "--ray",
}
# What appears with its first value.
WITH_A_VALUE = {"taichi_bound_requests_total"}


def expressions() -> Iterator[tuple[str, str]]:
    """Each expression of the board and the rules, after where it stands."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"panel {panel['title']} {target['refId']}", target["expr"]
    for rule in ALERTS:
        yield f"alert {rule['alert']}", rule["expr"]


def histogram(name: str) -> set[str]:
    return {f"{name}_{part}" for part in ("bucket", "sum", "count")}


TIMES = (
    histogram("vllm:time_to_first_token_seconds")
    | histogram("vllm:inter_token_latency_seconds")
    | histogram("vllm:e2e_request_latency_seconds")
)
TOKENS = {"vllm:prompt_tokens_total", "vllm:generation_tokens_total"}

# Its labels are the settings of vLLM's cache.
INFO = "vllm:cache_config_info"

# The metrics of the boards in vLLM's repository, by the file of each below examples/observability. Rows
# that are collapsed are left out: each needs a flag (--kv-cache-metrics, --enable-mfu-metrics and the like).
PUBLISHED: dict[str, set[str]] = {
    "prometheus_grafana/grafana.json": TIMES
    | TOKENS
    | {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:request_prompt_tokens_bucket",
        "vllm:request_generation_tokens_bucket",
        "vllm:request_success_total",
        "vllm:request_queue_time_seconds_sum",
        "vllm:request_prefill_time_seconds_sum",
        "vllm:request_decode_time_seconds_sum",
        "vllm:request_max_num_generation_tokens_sum",
    },
    "dashboards/grafana/performance_statistics.json": TIMES | TOKENS | {"vllm:iteration_tokens_total_count"},
    "dashboards/grafana/query_statistics.json": TOKENS
    | {
        "vllm:request_success_total",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:request_prompt_tokens_bucket",
    },
    "dashboards/grafana/vllm_service_status.json": TOKENS
    | {
        "vllm:engine_sleep_state",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:num_requests_running",
        "vllm:request_success_total",
    },
    "dashboards/grafana/vllm_overview.json": TIMES
    | TOKENS
    | histogram("vllm:request_time_per_output_token_seconds")
    | histogram("vllm:request_queue_time_seconds")
    | histogram("vllm:request_prefill_time_seconds")
    | histogram("vllm:request_decode_time_seconds")
    | histogram("vllm:iteration_tokens_total")
    | histogram("vllm:request_prompt_tokens")
    | histogram("vllm:request_generation_tokens")
    | {
        "up",
        "http_requests_total",
        "http_request_duration_seconds_sum",
        "http_request_duration_seconds_count",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:num_requests_waiting_by_reason",
        "vllm:kv_cache_usage_perc",
        "vllm:num_preemptions_total",
        "vllm:request_success_total",
        "vllm:prefix_cache_hits_total",
        "vllm:prefix_cache_queries_total",
        "vllm:external_prefix_cache_hits_total",
        "vllm:external_prefix_cache_queries_total",
        "vllm:mm_cache_hits_total",
        "vllm:mm_cache_queries_total",
        "vllm:prompt_tokens_by_source_total",
    },
    "dashboards/grafana/vllm_instances.json": TIMES
    | TOKENS
    | histogram("vllm:request_queue_time_seconds")
    | histogram("vllm:iteration_tokens_total")
    | {
        INFO,
        "process_start_time_seconds",
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_open_fds",
        "process_max_fds",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:num_requests_waiting_by_reason",
        "vllm:kv_cache_usage_perc",
        "vllm:num_preemptions_total",
        "vllm:request_success_total",
        "vllm:prefix_cache_hits_total",
        "vllm:prefix_cache_queries_total",
    },
    "dashboards/grafana/vllm_kv_cache.json": TOKENS
    | histogram("vllm:request_prompt_tokens")
    | histogram("vllm:request_prefill_kv_computed_tokens")
    | {
        "vllm:kv_cache_usage_perc",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting_by_reason",
        "vllm:num_preemptions_total",
        "vllm:prompt_tokens_cached_total",
        "vllm:prompt_tokens_by_source_total",
        "vllm:prompt_tokens_cached_by_source_total",
        "vllm:prefix_cache_hits_total",
        "vllm:prefix_cache_queries_total",
        "vllm:external_prefix_cache_hits_total",
        "vllm:external_prefix_cache_queries_total",
        "vllm:mm_cache_hits_total",
        "vllm:mm_cache_queries_total",
    },
}
