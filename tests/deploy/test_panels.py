"""Every panel shows something of a server that works: its expressions are evaluated, not only parsed."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("prometheus_client")  # it comes with vLLM

from history import History
from known import ours, prometheus, vllms_here
from promql import COUNTER, Known, parsed
from scraping import with_everything
from sources import PANELS

from taichi_serve.messages import Move, Outcome
from taichi_serve.scheduling.counters import Attained, Kept

FIRST, LAST = 5.0, 600.0
GRAFANA = {"$__rate_interval": "10m", "$__range": "10m", "$job": "taichi", "$instance": "here:8000"}
TARGETS = [(panel, target) for panel in PANELS for target in panel["targets"]]


@pytest.fixture(scope="module")
def known() -> dict[str, Known]:
    return prometheus() | ours() | vllms_here()


@pytest.fixture(scope="module")
def history(known: dict[str, Known]) -> History:
    """Two scrapes of a server between which every counter grew."""
    here, kept = with_everything(), History()
    for at in (FIRST, LAST):
        kept.scrape(at, here)
        grown(here)
        for name, metric in known.items():
            if name.startswith("vllm:"):
                vllms_sample(kept, at, name, metric)
    return kept


def grown(here: Any) -> None:
    """A little of everything."""
    recorder, counters = here.recorder, here.scheduler.counters
    recorder.accepted += 10
    recorder.recomputes += 1
    recorder.moved_bytes += 1000
    recorder.bound["an image"] += 1
    for outcome in Outcome:
        recorder.outcomes[outcome] += 2
    for move in Move:
        recorder.moves[move] += 2
    for count in here.scheduler.links.counted.values():
        count.moves, count.kv_tokens, count.gaps = count.moves + 2, count.kv_tokens + 200, count.gaps + 0.02
        count.refused += 1
    counters.attained["default"] = Attained(*(Kept(8, 2) for _ in range(3)))
    for name in ("i0", "i1"):
        counters.through(name, prompt_tokens=100, predicted=50, actual=40)
        for drift in (here.scheduler.accuracy[name].ttft, here.scheduler.accuracy[name].tpot):
            drift.add(predicted=0.5, actual=0.6)


def vllms_sample(history: History, at: float, name: str, metric: Known) -> None:
    labels = dict.fromkeys(set(metric.labels) - {"job", "instance", "le"}, "1")
    value = at if metric.kind == COUNTER else 0.5
    for edge in ("0.5", "+Inf") if "le" in metric.labels else (None,):
        history.add(at, name, value, labels if edge is None else {**labels, "le": edge})


@pytest.mark.parametrize(
    ("panel", "target"), TARGETS, ids=lambda one: str(one.get("title", one.get("refId")))
)
def test_a_panel_has_something_to_show(
    panel: dict[str, Any], target: dict[str, Any], known: dict[str, Known], history: History
) -> None:
    text = target["expr"]
    for variable, value in GRAFANA.items():
        text = text.replace(variable, value)
    shown = history.gives(parsed(text, known).tree, LAST)
    assert shown
    assert not any(math.isnan(value) for value in shown.values())
    names = {part.split("}}")[0] for part in target["legendFormat"].split("{{")[1:]}
    assert all(names <= {label for label, _ in labels} for labels in shown), "its legend names other labels"
