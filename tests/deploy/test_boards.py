"""The board, the alarms and vLLM's own boards ask for what a server exports, in PromQL with a meaning."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest

pytest.importorskip("prometheus_client")  # it comes with vLLM

import yaml
from known import http, ours, process, prometheus, vllms_here
from promql import Known, parsed
from sources import (
    ALERTS,
    BOARD,
    DEPLOY,
    INFO,
    PANELS,
    PUBLISHED,
    RULES,
    WITH_A_FLAG,
    WITH_A_VALUE,
    expressions,
)

from taichi_serve.scheduling.policy import Policy

EXPRESSIONS = dict(expressions())
ROWS = ["SLO", "Instances", "Moves", "Predictions", "KV and prefixes"]
UNITS = {"short", "none", "s", "percentunit", "reqps", "ops", "Bps"}


@pytest.fixture(scope="module")
def known() -> dict[str, Known]:
    return prometheus() | process() | http() | ours() | vllms_here()


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_expression_is_promql_over_metrics_that_a_server_exports(
    where: str, known: dict[str, Known]
) -> None:
    query = parsed(EXPRESSIONS[where], known)
    assert query.names
    carried = {label for name in query.names for label in known[name].labels}
    assert query.groups <= carried, "it groups by a label that none of its metrics has"


@pytest.mark.parametrize("board", PUBLISHED)
def test_whatever_vllms_boards_ask_for_is_exported(board: str, known: dict[str, Known]) -> None:
    assert PUBLISHED[board] <= {*known, INFO}


def test_every_metric_of_ours_is_on_the_board_or_in_an_alarm(known: dict[str, Known]) -> None:
    shown = {name for text in EXPRESSIONS.values() for name in parsed(text, known).names}
    # The tuner's own count of the last requests; the board has the attainment of all that were judged.
    assert set(ours()) - shown == {"taichi_attainment"}


def test_what_vllm_registers_under_a_condition_is_not_counted_on(known: dict[str, Known]) -> None:
    here = {name for name in known if name.startswith("vllm:")}
    assert {"vllm:kv_cache_usage_perc", "vllm:prompt_tokens_total"} <= here
    # With --enable-lora, with --kv-cache-metrics, and where an instance takes KV in.
    conditional = ("lora_requests_info", "kv_block_lifetime_seconds_sum", "num_requests_kv_fetch_by_stage")
    assert here.isdisjoint(f"vllm:{name}" for name in conditional)


def test_what_appears_with_a_flag_or_a_value_is_one_of_ours() -> None:
    assert {*WITH_A_FLAG, *WITH_A_VALUE} <= set(ours())


# -------------------------------------------------------------------------------------------------- the board


def test_the_board_has_a_row_for_every_part() -> None:
    assert [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"] == ROWS


def test_panels_have_numbers_of_their_own_and_lie_beside_each_other() -> None:
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    for one, other in combinations(BOARD["panels"], 2):
        assert not overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in BOARD["panels"])


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    across = one["x"] < other["x"] + other["w"] and other["x"] < one["x"] + one["w"]
    down = one["y"] < other["y"] + other["h"] and other["y"] < one["y"] + one["h"]
    return across and down


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_a_panel_says_what_it_shows_and_asks_the_data_source_that_was_chosen(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    for target in panel["targets"]:
        assert 'job=~"$job", instance=~"$instance"' in target["expr"]
        assert target["legendFormat"]


def test_the_variables_of_the_board_are_those_that_it_uses() -> None:
    defined = {variable["name"] for variable in BOARD["templating"]["list"]}
    used = {name for text in EXPRESSIONS.values() for name in re.findall(r"\$(\w+)", text)}
    assert used - {"__rate_interval", "__range"} == defined - {"datasource"}


def test_grafana_is_given_the_folder_that_has_the_board() -> None:
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/taichi.yaml").read_text())
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    scraping = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert provider["providers"][0]["options"]["path"] == "/var/lib/grafana/dashboards"
    assert source["datasources"][0]["jsonData"]["timeInterval"] == scraping["global"]["scrape_interval"]


# ------------------------------------------------------------------------------------------------- the alarms


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_an_alarm_says_how_bad_it_is_what_happened_and_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"Taichi[A-Z]\w+", rule["alert"])
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert set(rule["annotations"]) == {"summary", "description", "action"}
    assert all(rule["annotations"].values())


def test_alarms_have_names_of_their_own_and_groups_too() -> None:
    names, groups = [rule["alert"] for rule in ALERTS], [group["name"] for group in RULES["groups"]]
    assert len(set(names)) == len(names)
    assert len(set(groups)) == len(groups)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_labels_that_an_alarm_names_are_those_of_what_it_asks(
    rule: dict[str, Any], known: dict[str, Known]
) -> None:
    query = parsed(rule["expr"], known)
    text = " ".join(rule["annotations"].values())
    named = set(re.findall(r"\$labels\.(\w+)", text))
    aggregated = "sum by" in rule["expr"]
    carried = query.groups if aggregated else {one for name in query.names for one in known[name].labels}
    assert named <= carried


def test_the_server_that_is_down_is_one_that_is_scraped() -> None:
    scraping = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (job,) = scraping["scrape_configs"]
    assert scraping["rule_files"] == ["rules.yml"]
    named = {name for rule in ALERTS for name in re.findall(r'job="(\w+)"', rule["expr"])}
    assert named == {job["job_name"]}


def test_kv_is_called_full_above_the_watermark_only() -> None:
    (rule,) = (rule for rule in ALERTS if rule["alert"] == "TaichiKVFull")
    assert float(rule["expr"].rsplit(" ", 1)[1]) > Policy().watermark
