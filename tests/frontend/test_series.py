"""vLLM's metrics of instances that come and leave: as those of the first ones, and then gone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY
from vllm.v1.engine import EngineCoreOutputs, FinishReason
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, SchedulerStats

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.frontend.client import ClusterClient
from taichi_serve.frontend.series import ENGINE, Left, of_known, one_fewer, one_more
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


def test_of_one_that_left_nothing_is_left_and_the_others_stay_as_they_were(
    manager: StatLoggerManager,
) -> None:
    before = shown()
    for index in range(2, 6):  # who comes next has another number each time
        one_more(manager, index)
        manager.record(SchedulerStats(num_running_reqs=3), step(5), engine_idx=index)
        one_fewer(manager, index)
    assert shown() == before
    manager.log()
    assert manager.engine_indexes == [0, 1]
    one_fewer(manager, 0)  # the first one, too, whose series were those to go by
    one_more(manager, 9)
    manager.record(SchedulerStats(), step(5), engine_idx=9)
    assert shown() == {"1": before["1"], "9": before["1"]}
    one_fewer(manager, 1)
    one_fewer(manager, 9)  # the last one stays
    assert set(shown()) == {"9"}


def test_what_ends_on_nobody_ends_on_the_first(manager: StatLoggerManager) -> None:
    one_fewer(manager, 0)
    record = of_known(manager)
    record(SchedulerStats(num_running_reqs=3), step(5), engine_idx=0)
    record(None, step(5), None, 7)
    labels = {"model_name": str(cached_tiny_model()), ENGINE: "1"}
    assert REGISTRY.get_sample_value("vllm:generation_tokens_total", labels) == 10
    assert REGISTRY.get_sample_value("vllm:num_requests_running", labels) == 0
    assert set(shown()) == {"1"}


async def test_one_is_forgotten_after_its_last_outputs() -> None:
    cluster: Any = SimpleNamespace(engines=[])
    client = ClusterClient(cluster, asyncio.Queue())
    gone: list[int] = []
    client.left = gone.append
    last, next_one = EngineCoreOutputs(engine_index=1), EngineCoreOutputs(engine_index=0)
    for word in (last, Left(1), Left(2), next_one):
        client.outputs.put_nowait(word)
    assert (await client.get_output_async(), gone) == (last, [])
    assert (await client.get_output_async(), gone) == (next_one, [1, 2])


def test_who_is_known_changes_nothing(manager: StatLoggerManager) -> None:
    before = shown()
    one_more(manager, 1)
    one_more(None, 3)
    assert shown() == before
