"""vLLM's own metrics of instances that come and leave: it makes the series of all engines once, at the start.

Every table of series that has an engine gets one more, beside it and with the same other labels. Who left is
in no table, and its series are gone: no number is given twice, so they would become more and more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from vllm.v1.metrics.loggers import (
    AggregatedLoggingStatLogger,
    PerEngineStatLoggerAdapter,
    PrometheusStatLogger,
    StatLoggerManager,
)
from vllm.v1.metrics.stats import SchedulerStats

ENGINE = "engine"  # vLLM's label of an engine's number


@dataclass(frozen=True, slots=True)
class Left:
    """A word among the outputs of engines: this one left, and no statistics of it come after this."""

    index: int


def one_more(manager: StatLoggerManager | None, index: int) -> None:
    """Have vLLM's statistics know an engine of this number; nothing where they do already."""
    if manager is None or index in manager.engine_indexes:
        return
    like = manager.engine_indexes[0]
    manager.engine_indexes.append(index)
    for logger in manager.stat_loggers:
        if logger.engine_indexes is not manager.engine_indexes:
            logger.engine_indexes.append(index)
        if isinstance(logger, PerEngineStatLoggerAdapter):
            loggers = logger.per_engine_stat_loggers
            loggers[index] = type(loggers[like])(loggers[like].vllm_config, index)
        elif isinstance(logger, AggregatedLoggingStatLogger):
            logger.last_scheduler_stats_dict[index] = SchedulerStats()
        elif isinstance(logger, PrometheusStatLogger):
            _extend(vars(logger).values(), like, index)


def one_fewer(manager: StatLoggerManager | None, index: int) -> None:
    """Have vLLM's statistics forget the engine of this number, and /metrics, too."""
    if manager is None or index not in manager.engine_indexes or len(manager.engine_indexes) == 1:
        return
    for logger in manager.stat_loggers:
        if logger.engine_indexes is not manager.engine_indexes:
            logger.engine_indexes.remove(index)
        if isinstance(logger, PerEngineStatLoggerAdapter):
            logger.per_engine_stat_loggers.pop(index, None)
        elif isinstance(logger, AggregatedLoggingStatLogger):
            logger.last_scheduler_stats_dict.pop(index, None)
        elif isinstance(logger, PrometheusStatLogger):
            _shorten(vars(logger).values(), index)
    manager.engine_indexes.remove(index)
    with warnings.catch_warnings(action="ignore"):  # in files of several processes they stay (relayed.py)
        for metric in set(REGISTRY._names_to_collectors.values()):
            if isinstance(metric, MetricWrapperBase) and ENGINE in metric._labelnames:
                metric.remove_by_labels({ENGINE: str(index)})


def of_known(manager: StatLoggerManager) -> Callable[..., None]:
    """Its `record`, for which what ended without an instance, or on one that left, ended on the first."""
    record = manager.record

    def recorded(
        scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int | None = None
    ) -> None:
        if (engine_idx or 0) in manager.engine_indexes:
            record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)
        else:
            record(None, iteration_stats, mm_cache_stats, manager.engine_indexes[0])

    return recorded


def _extend(values: Iterable[Any], like: int, index: int) -> None:
    """In every table among these, and in what they hold of vLLM's, give `index` what `like` has."""
    for value in list(values):
        # Engines are numbers; finish reasons, by which some tables are, only count as if they were.
        if isinstance(value, dict) and any(type(key) is int and key == like for key in value):
            value.setdefault(index, _beside(value[like], index))
        elif isinstance(value, dict):
            _extend(value.values(), like, index)
        elif isinstance(value, MetricWrapperBase):
            _repeat(value, like, index)
        elif type(value).__module__.startswith("vllm.") and "Prom" in type(value).__name__:
            _extend(vars(value).values(), like, index)


def _shorten(values: Iterable[Any], index: int) -> None:
    """Take `index` out of every table in which `_extend` would put it."""
    for value in list(values):
        if isinstance(value, dict) and any(type(key) is int for key in value):
            value.pop(index, None)
        elif isinstance(value, dict):
            _shorten(value.values(), index)
        elif type(value).__module__.startswith("vllm.") and "Prom" in type(value).__name__:
            _shorten(vars(value).values(), index)


def _repeat(metric: MetricWrapperBase, like: int, index: int) -> None:
    """Of a metric without a table: the series that `like` has."""
    if ENGINE in metric._labelnames and metric._is_parent():
        for values in list(metric._metrics):
            labels = dict(zip(metric._labelnames, values, strict=True))
            if labels[ENGINE] == str(like):
                metric.labels(**{**labels, ENGINE: str(index)})


def _beside(one: Any, index: int) -> Any:
    """What stands for another engine where this stands for one: a series, or the values of its labels."""
    if isinstance(one, MetricWrapperBase):
        parent = REGISTRY._names_to_collectors[one._name]
        labels = dict(zip(parent._labelnames, one._labelvalues, strict=True))
        return parent.labels(**{**labels, ENGINE: str(index)})
    if isinstance(one, list | tuple):  # labels in vLLM's order: the model, the engine, then others
        return type(one)([one[0], str(index), *one[2:]])
    return one
