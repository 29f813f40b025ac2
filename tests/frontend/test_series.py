"""vLLM's metrics of an instance that was added: as those of the first ones, and they stay as they were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, SchedulerStats

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.frontend.series import ENGINE, one_more
from taichi_serve.tiny import cached_tiny_model


@pytest.fixture
def manager() -> Iterator[StatLoggerManager]:
    config = flags.engine_config([str(cached_tiny_model()), "--d-heavy", "2", "--enforce-eager"], "series")
    yield StatLoggerManager(config, [0, 1])
    unregister_vllm_metrics()


def shown() -> dict[str, set[str]]:
    """Which series there are of each engine."""
    found: dict[str, set[str]] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name.startswith("vllm:") and (engine := sample.labels.get(ENGINE)) is not None:
                rest = {name: value for name, value in sample.labels.items() if name != ENGINE}
                found.setdefault(engine, set()).add(f"{sample.name}{sorted(rest.items())}")
    return found


def step(tokens: int) -> Any:
    """The statistics of a step in which a request ended."""
    stats = IterationStats()
    stats.num_generation_tokens = tokens
    stats.finished_requests.append(
        FinishedRequestStats(FinishReason.STOP, "request", num_generation_tokens=3)
    )
    return stats


def test_one_that_was_added_has_the_series_of_the_others(manager: StatLoggerManager) -> None:
    before = shown()
    one_more(manager, 7)
    after = shown()
    assert set(after) == {"0", "1", "7"}
    assert {"0": after["0"], "1": after["1"]} == before
    # What vLLM says once about the configuration is not said again.
    assert {name for name in before["1"] - after["7"] if "config_info" not in name} == set()


def test_its_steps_are_counted_and_those_of_others_still_are(manager: StatLoggerManager) -> None:
    one_more(manager, 7)
    for index in (7, 0, 7):
        manager.record(SchedulerStats(num_running_reqs=index), step(5), engine_idx=index)
    manager.log()

    def value(name: str, engine: str) -> float | None:
        model = str(cached_tiny_model())
        return REGISTRY.get_sample_value(name, {"model_name": model, ENGINE: engine})

    assert [value("vllm:generation_tokens_total", str(engine)) for engine in (0, 1, 7)] == [5, 0, 10]
    assert value("vllm:num_requests_running", "7") == 7


def test_who_is_known_changes_nothing(manager: StatLoggerManager) -> None:
    before = shown()
    one_more(manager, 1)
    one_more(None, 3)
    assert shown() == before
