"""What board, alarms and vLLM's own boards ask for is in a scrape of a real server, with those labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import httpx
from known import http, ours, process, prometheus, vllm_source, vllms
from load import PATH, Wish
from prometheus_client.parser import text_string_to_metric_families
from promql import parsed
from servers import Server, until
from sources import PUBLISHED, WITH_A_FLAG, WITH_A_VALUE, expressions

from taichi_serve.bench.client import stream

BY_PROMETHEUS = {"up", "job", "instance"}


async def scraped(client: httpx.AsyncClient) -> Mapping[str, set[str]]:
    """The names of all samples, each with its labels."""
    found: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    return found


async def after_a_request(server: Server) -> Mapping[str, set[str]]:
    """A scrape in which a request has ended: what there is from the first request on is there."""
    async with server.client() as client:
        answer = await stream(client, PATH, Wish([11, 12, 13] * 30, 16).body())
        assert answer.ok, answer.error

        async def judged() -> bool:
            return "taichi_window_attainment" in await scraped(client)

        await until(judged, 10, "the attainment of the last minute is there")
        return await scraped(client)


async def test_a_scrape_has_every_metric_of_the_board_and_the_alarms(hybrid: Server) -> None:
    found = await after_a_request(hybrid)
    source = vllm_source()
    assert source is not None
    known = prometheus() | process() | http() | ours() | vllms(source)
    asked = {name for _, text in expressions() for name in parsed(text, known).names}
    assert asked - set(found) - BY_PROMETHEUS <= {*WITH_A_FLAG, *WITH_A_VALUE}


async def test_a_scrape_has_every_metric_of_vllms_own_boards(hybrid: Server) -> None:
    found = await after_a_request(hybrid)
    missing = {board: names - set(found) - BY_PROMETHEUS for board, names in PUBLISHED.items()}
    assert {board: names for board, names in missing.items() if names} == {}


async def test_metrics_have_the_labels_that_the_parser_of_boards_knows(hybrid: Server) -> None:
    found = await after_a_request(hybrid)
    source = vllm_source()
    assert source is not None
    known = process() | http() | ours() | vllms(source)
    there = {name: metric for name, metric in known.items() if name in found}
    assert len(there) > 90
    differing = {
        name: (found[name], set(metric.labels) - BY_PROMETHEUS)
        for name, metric in there.items()
        if found[name] != set(metric.labels) - BY_PROMETHEUS
    }
    assert differing == {}
