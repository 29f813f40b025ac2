"""Every metric that a server can export, without one: ours off its collector, vLLM's out of its source."""

from __future__ import annotations

import ast
import importlib.util
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from promql import COUNTER, GAUGE, Known
from scraping import with_everything

from taichi_serve.frontend.metrics import TaichiCollector

# Prometheus adds these to everything that it scrapes.
Labels = dict[str, frozenset[str] | None]
SCRAPED: Labels = {"job": None, "instance": None}
# Labels with values that no list can have.
OPEN = {"engine", "class", "by", "reading", "model_name", "le", "handler", "status", "source", "target"}
KINDS = {"_counter_cls": "counter", "_gauge_cls": "gauge", "_histogram_cls": "histogram"}


def prometheus() -> dict[str, Known]:
    """What Prometheus notes of a target itself."""
    return {"up": Known(GAUGE, SCRAPED)}


def http() -> dict[str, Known]:
    """What vLLM's front end counts of HTTP; a scrape of a real server is asked whether it is so."""
    requests = Known(COUNTER, {"handler": None, "method": None, "status": None, **SCRAPED})
    labels: Labels = {"handler": None, "method": None, **SCRAPED}
    return {"http_requests_total": requests, **samples("http_request_duration_seconds", "histogram", labels)}


def process() -> dict[str, Known]:
    """What prometheus_client tells of the server's own process."""
    gauges = ("start_time_seconds", "resident_memory_bytes", "virtual_memory_bytes", "open_fds", "max_fds")
    found = {f"process_{name}": Known(GAUGE, SCRAPED) for name in gauges}
    return {"process_cpu_seconds_total": Known(COUNTER, SCRAPED), **found}


def ours() -> dict[str, Known]:
    """What TaichiCollector gives."""
    found = {}
    for metric in TaichiCollector(with_everything()).collect():
        values: dict[str, set[str]] = defaultdict(set)
        for sample in metric.samples:
            for label, value in sample.labels.items():
                values[label].add(value)
        labels = {name: None if name in OPEN else frozenset(seen) for name, seen in values.items()}
        for name in {sample.name for sample in metric.samples}:
            found[name] = Known(COUNTER if metric.type == "counter" else GAUGE, {**labels, **SCRAPED})
    return found


def vllm_source() -> Path | None:
    """Where vLLM registers its metrics; None where vLLM is not installed. It is not imported."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "v1" / "metrics" / "loggers.py"


def vllms_here() -> dict[str, Known]:
    """What the installed vLLM exports; where there is none, the test is skipped."""
    source = vllm_source()
    if source is None:
        pytest.skip("vLLM is not installed")
    return vllms(source)


def vllms(source: Path) -> dict[str, Known]:
    """What vLLM exports whatever its flags: what its source registers under no condition."""
    found = {}
    for call in unconditional(ast.parse(source.read_text(encoding="utf-8"))):
        words = {keyword.arg: keyword.value for keyword in call.keywords}
        kind, name = registered(call), words.get("name")
        if kind and isinstance(name, ast.Constant) and str(name.value).startswith("vllm:"):
            labels = labels_of(words["labelnames"])
            found |= samples(str(name.value), kind, dict.fromkeys(labels) | SCRAPED)
    return found


def registered(call: ast.Call) -> str | None:
    """The type of metric that a call makes; None for any other call."""
    return KINDS.get(call.func.attr) if isinstance(call.func, ast.Attribute) else None


def unconditional(node: ast.AST) -> Iterator[ast.Call]:
    """Calls below no `if`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If):
            continue
        if isinstance(child, ast.Call):
            yield child
        yield from unconditional(child)


def labels_of(words: ast.expr) -> list[str]:
    """`labelnames`, which is model_name and engine, with more or without."""
    match words:
        case ast.Name(id="labelnames"):
            return ["model_name", "engine"]
        case ast.List(elts=names):
            return [str(one.value) for one in names if isinstance(one, ast.Constant)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return labels_of(left) + labels_of(right)
        case _:
            raise AssertionError(f"labels that cannot be read: {ast.unparse(words)}")


def samples(name: str, kind: str, labels: Labels) -> dict[str, Known]:
    """The names under which Prometheus keeps a metric."""
    match kind:
        case "counter":
            return {name.removesuffix("_total") + "_total": Known(COUNTER, labels)}
        case "gauge":
            return {name: Known(GAUGE, labels)}
        case _:
            bucket = Known(COUNTER, {"le": None, **labels})
            return {f"{name}_bucket": bucket} | {
                f"{name}_{of}": Known(COUNTER, labels) for of in ("sum", "count")
            }
