"""What a front end hands on to the scheduler's process: the same answers, over a socket file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter
from scraping import with_everything

from taichi_serve.dashboard.files import FILES, INDEX
from taichi_serve.frontend.several import relayed
from taichi_serve.frontend.several.inside import answered
from taichi_serve.messages import Event, Promised
from taichi_serve.slo import SLO


@asynccontextmanager
async def front_end(path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of one that hands on to the socket at this path."""
    inside = relayed.Inside(str(path))
    app = FastAPI()
    app.include_router(relayed.router(inside, lambda: {"0", "1"}))
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
            yield client
    finally:
        await inside.close()


@asynccontextmanager
async def served(directory: Path, told: list[Event] | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """The same before a system in miniature."""
    system: Any = with_everything()
    system.cluster.tell = (told if told is not None else []).append
    system.front.behind = lambda request_id: []
    system.viewers = SimpleNamespace(full=True)
    async with answered(system, directory / "inside"), front_end(directory / "inside") as client:
        yield client


async def test_the_page_comes_as_it_is_with_its_headers(tmp_path: Path) -> None:
    async with served(tmp_path) as client:
        answer = await client.get("/taichi/")
        assert answer.content == FILES[INDEX].content
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert len(answer.headers.get_list("content-type")) == 1


async def test_a_body_and_its_answer_go_through(tmp_path: Path) -> None:
    told: list[Event] = []
    async with served(tmp_path, told) as client:
        answer = await client.patch("/taichi/slo", json={"ttft": 2.5})
        assert (answer.status_code, answer.json()) == (200, {"ttft": 2.5, "tpot": 0.07})
        assert [type(event) for event in told] == [Promised]
        assert isinstance(told[0], Promised)
        assert told[0].slo == SLO(2.5, 0.07)


async def test_refusals_have_their_status_and_words(tmp_path: Path) -> None:
    async with served(tmp_path) as client:
        missing = await client.get("/taichi/requests/a/b?c=d")
        assert (missing.status_code, missing.json()["error"]["message"]) == (
            404,
            "no request 'a/b' among the last ones",
        )
        strange = await client.get("/taichi/requests/a%3Fb%20c%2Fd%25")
        assert strange.json()["error"]["message"] == "no request 'a?b c/d%' among the last ones"
        busy = await client.get("/taichi/events")
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "5")
        nowhere = await client.get("/taichi/nowhere")
        assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "not_found_error")


async def test_a_browser_is_led_to_the_page(tmp_path: Path) -> None:
    async with served(tmp_path) as client:
        answer = await client.get("/", headers={"accept": "text/html"})
        assert (answer.status_code, answer.headers["location"]) == (307, "taichi/")


async def test_a_scrape_has_the_metrics_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relayed, "_of_all", lambda engines: b"vllm:generation_tokens_total 5.0\n")
    async with served(tmp_path) as client:
        text = (await client.get("/metrics")).text
        assert "vllm:generation_tokens_total 5.0\n" in text
        assert 'taichi_front_end_requests{front_end="f0"} 3.0\n' in text


async def test_where_the_scheduler_does_not_answer_it_is_said_and_vllms_metrics_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relayed, "_of_all", lambda engines: b"vllm:generation_tokens_total 5.0\n")
    async with front_end(tmp_path / "nobody") as client:
        answer = await client.get("/taichi/state")
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "overloaded_error")
        assert (await client.get("/metrics")).text == "vllm:generation_tokens_total 5.0\n"


def test_of_instances_that_left_nothing_is_shown() -> None:
    registry = CollectorRegistry()
    tokens = Counter("tokens", "Tokens", ["model_name", "engine"], registry=registry)
    for engine in ("0", "1", "7"):
        tokens.labels("tiny", engine).inc(5)
    Counter("requests", "Requests", registry=registry).inc(3)
    shown = [one for metric in relayed.Shown(registry, {"0", "7"}).collect() for one in metric.samples]
    values = [(one.labels.get("engine"), one.value) for one in shown if one.name.endswith("_total")]
    assert values == [("0", 5.0), ("7", 5.0), (None, 3.0)]
