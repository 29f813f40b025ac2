"""Samples over time, and what an expression of the board or an alarm gives over them.

As Prometheus evaluates it, but that an increase is not extrapolated to the edges of its window, and that a
quantile is the upper edge of its bucket.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from promql import Node

from taichi_serve.frontend.metrics import TaichiCollector

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]

LOOK_BACK = 300.0  # seconds for which a sample stands
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
TARGET = {"job": "taichi", "instance": "here:8000"}
ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda a, b: a / b if b else float("nan") if not a else float("inf"),
}
COMPARED: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
AGGREGATED: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "min": min,
    "max": max,
    "count": lambda values: float(len(values)),
}


class History:
    """What Prometheus would have kept."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, Labels], list[tuple[float, float]]] = defaultdict(list)

    def add(self, at: float, name: str, value: float, labels: Mapping[str, str] | None = None) -> None:
        """One sample, at a time in seconds."""
        self._series[name, frozenset({**TARGET, **(labels or {})}.items())].append((at, value))

    def scrape(self, at: float, system: Any) -> None:
        """All that the collector gives."""
        for metric in TaichiCollector(system).collect():
            for sample in metric.samples:
                self.add(at, sample.name, sample.value, sample.labels)

    def gives(self, tree: Node, at: float) -> Vector:
        """The vector that an expression gives: what an alarm fires for."""
        found = self._value(tree, at)
        assert isinstance(found, dict)
        return found

    def _value(self, node: Node, at: float) -> Vector | float:
        match node.what:
            case "number":
                return float(node.of[0])
            case "select":
                return {labels: seen[-1][1] for labels, seen in self._selected(node, at, LOOK_BACK).items()}
            case "call":
                return self._called(node, at)
            case "aggregate":
                name, (of,), (word, labels) = node.of
                assert word == "by"
                return aggregated(name, self.gives(of, at), labels)
            case "binary":
                sign, left, right, matched = node.of
                assert not matched, "labels are matched all with all here"
                return combined(sign, self._value(left, at), self._value(right, at))
            case _:
                raise AssertionError(f"no alarm needs {node.what}")

    def _selected(self, node: Node, at: float, window: float) -> dict[Labels, list[tuple[float, float]]]:
        wanted, matchers, _ = node.of
        found = {}
        for (name, labels), samples in self._series.items():
            seen = [(when, value) for when, value in samples if at - window < when <= at]
            if name == wanted and seen and all(fits(labels, *matcher) for matcher in matchers):
                found[labels] = seen
        return found

    def _called(self, node: Node, at: float) -> Vector:
        name, arguments = node.of
        if name == "histogram_quantile":
            share, of = arguments
            return quantiles(float(share.of[0]), self.gives(of, at))
        (of,) = arguments
        assert name in {"rate", "increase"}, name
        window = of.of[2]
        found = {}
        for labels, seen in self._selected(of, at, float(window[:-1]) * UNITS[window[-1]]).items():
            (first, before), (last, after) = seen[0], seen[-1]
            if last > first:
                found[labels] = (after - before) / (last - first if name == "rate" else 1.0)
        return found


def fits(labels: Labels, label: str, sign: str, value: str) -> bool:
    """Whether a series is one that a matcher wants."""
    here = dict(labels).get(label, "")
    same = here == value if sign in {"=", "!="} else re.fullmatch(value, here) is not None
    return same == (sign in {"=", "=~"})


def aggregated(name: str, vector: Vector, by: set[str]) -> Vector:
    """One value for each group."""
    groups: dict[Labels, list[float]] = defaultdict(list)
    for labels, value in vector.items():
        groups[frozenset(pair for pair in labels if pair[0] in by)].append(value)
    return {labels: AGGREGATED[name](values) for labels, values in groups.items()}


def combined(sign: str, left: Vector | float, right: Vector | float) -> Vector | float:
    """What an operator makes of both; a comparison keeps what it is true of."""
    if isinstance(left, float) and isinstance(right, float):
        return ARITHMETIC[sign](left, right)
    if not isinstance(left, dict):
        assert isinstance(right, dict)
        return {labels: ARITHMETIC[sign](left, value) for labels, value in right.items()}
    if sign == "and":
        assert isinstance(right, dict)
        return {labels: value for labels, value in left.items() if labels in right}
    pairs = {
        labels: (value, right if isinstance(right, float) else right[labels])
        for labels, value in left.items()
        if isinstance(right, float) or labels in right
    }
    if sign in COMPARED:
        return {labels: here for labels, (here, there) in pairs.items() if COMPARED[sign](here, there)}
    return {labels: ARITHMETIC[sign](here, there) for labels, (here, there) in pairs.items()}


def quantiles(share: float, vector: Vector) -> Vector:
    """The upper edge of the bucket that each quantile is in."""
    groups: dict[Labels, list[tuple[float, float]]] = defaultdict(list)
    for labels, count in vector.items():
        edge = float(dict(labels)["le"].replace("+Inf", "inf"))
        groups[frozenset(pair for pair in labels if pair[0] != "le")].append((edge, count))
    found = {}
    for labels, buckets in groups.items():
        buckets.sort()
        found[labels] = next(edge for edge, count in buckets if count >= share * buckets[-1][1])
    return found
