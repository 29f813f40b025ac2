"""vLLM's real application behind the door: every route it can have, so that a new vLLM cannot open one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any

import httpx
import pytest
from building import EVERY_TASK, KEY, WORDS, application, arguments
from fastapi import FastAPI
from fastapi.routing import APIRoute
from models import Path, bodies, marked
from prometheus_client import REGISTRY
from starlette.routing import BaseRoute, Mount, WebSocketRoute
from vllm.config import ModelConfig

from taichi_serve.frontend import parsed
from taichi_serve.frontend.anthropic_form import kind as kind_of
from taichi_serve.frontend.body import MAX_BODY
from taichi_serve.frontend.elsewhere import NOT_HERE

# A finished answer is given back to be put into words; no engine sees it.
NO_ENGINE = {"/v1/chat/completions/derender", "/v1/completions/derender"}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """With the routes of every task, of development mode and of adapters."""
    return application(*WORDS, tasks=EVERY_TASK)


@pytest.fixture
async def client(app: FastAPI) -> Any:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        yield client


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Method and path of every route, mounts and their inside too."""
    for route in app.routes:
        yield from _routes(route)


def _routes(route: BaseRoute) -> Iterator[tuple[str, str]]:
    assert hasattr(route, "path"), f"{route} cannot be walked: this test would miss what is in it"
    path = re.sub(r"\{[^}]*\}", "x", route.path)
    if isinstance(route, Mount):
        yield from (("GET", path + below) for below in ("", "/", "/x"))
        for inner in route.routes or ():
            yield from ((method, path + below) for method, below in _routes(inner))
    elif not isinstance(route, WebSocketRoute):
        yield from ((method, path) for method in (*route.methods, "HEAD", "OPTIONS"))


PAGE = {"/taichi", "/taichi/"}  # files that hold nothing; those below /taichi/page are walked elsewhere


async def test_without_a_key_every_route_says_401_but_those_that_say_nothing(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    answered: dict[str, set[int]] = {}
    for method, path in routes(app):
        request = httpx.Request(method, f"http://door{path}")
        answered.setdefault(path, set()).add((await client.send(request)).status_code)
    open_ones = {path for path, statuses in answered.items() if statuses != {401}}
    assert open_ones == {"/health", "/live", "/ready", "/ping", "/version"} | PAGE
    assert len(answered) > 70
    assert {"/metrics", "/docs", "/openapi.json", "/invocations", "/sleep", "/static/x"} <= set(answered)


async def test_no_websocket_opens_without_a_key(app: FastAPI) -> None:
    sockets = [route.path for route in app.routes if isinstance(route, WebSocketRoute)]
    assert sockets
    for path in sockets:
        said: list[Any] = []

        async def send(message: Any, said: list[Any] = said) -> None:
            said.append(message["type"])

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        await app({"type": "websocket", "path": path, "headers": [], "query_string": b""}, receive, send)
        assert said == ["websocket.close"]


def places(app: FastAPI) -> set[tuple[str, Path]]:
    """Every field of every request model that steers transfers or ranks, with the route's path."""
    model = ModelConfig(model=arguments().model)
    return {(path, field) for path, kind in bodies(app, model) for field in marked(kind)}


async def test_no_route_takes_an_internal_parameter_wherever_its_model_has_it(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    found = places(app)
    assert {"/v1/messages", "/v1/responses", "/inference/v1/generate", "/invocations", "/v1/completions"} <= {
        path for path, _ in found
    }
    with parsed.looked_at():
        for path, field in sorted(found):
            if path in NO_ENGINE:
                continue
            inner: Any = {"taichi": 1} if field[-1] in ("vllm_xargs", "extra_args") else {"a": 1}
            if path.startswith("/v1/audio"):
                words: dict[str, Any] = {"data": {field[-1]: json.dumps(inner)}, "files": {"file": b"x"}}
            else:
                for name in reversed(field):
                    inner = {name: inner}
                words = {"json": inner}
            answer = await client.post(path, headers=headers, **words)
            assert answer.status_code == 400, (path, field, answer.text)
            error = answer.json()["error"]
            if path.startswith("/v1/messages"):  # Anthropic's form has no parameter
                assert field[-1] in error["message"] or "taichi" in error["message"], (path, field)
            else:
                assert error["param"] in ("taichi", field[-1]), (path, field)


async def test_only_json_is_read_as_json(app: FastAPI, client: httpx.AsyncClient) -> None:
    """Other content types never reach a model that could hold an internal parameter."""
    body = b'{"kv_transfer_params": {"a": 1}}'
    types = ["text/plain", "application/x-www-form-urlencoded", "application/vnd.api+json", "", "multipart/x"]
    with parsed.looked_at():
        for path in sorted({path for path, _ in places(app)} - NO_ENGINE):
            for kind in types:
                headers = {"Authorization": f"Bearer {KEY}", "Content-Type": kind}
                answer = await client.post(path, content=body, headers=headers)
                assert 400 <= answer.status_code < 500, (path, kind, answer.text)
                error = answer.json()["error"]
                if path.startswith("/v1/messages"):
                    assert error["type"] == kind_of(answer.status_code)
                else:
                    assert error["code"] == answer.status_code


async def test_whatever_is_wrong_on_anthropics_routes_is_said_in_anthropics_form(
    client: httpx.AsyncClient,
) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    good = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    cases: list[tuple[int, str, str, dict[str, Any]]] = [
        (401, "authentication_error", "POST", {"json": good}),  # at the door
        (431, "invalid_request_error", "POST", {"headers": key | {f"x-{n}": "y" for n in range(300)}}),
        (413, "request_too_large", "POST", {"headers": key, "content": b" " * (MAX_BODY + 1)}),
        (400, "invalid_request_error", "POST", {"headers": key, "json": good | {"kv_transfer_params": {}}}),
        (400, "invalid_request_error", "POST", {"headers": key, "json": {"model": "tiny"}}),  # vLLM's words
        (405, "invalid_request_error", "DELETE", {"headers": key}),  # the router
    ]
    with parsed.looked_at():
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            for status, kind, method, words in cases:
                answer = await client.request(method, path, **words)
                said = answer.json()
                assert answer.status_code == status, (path, said)
                assert (said.keys(), said["type"]) == ({"type", "error"}, "error")
                assert (said["error"].keys(), said["error"]["type"]) == ({"type", "message"}, kind)
                assert said["error"]["message"]
                assert answer.headers["content-length"] == str(len(answer.content))
        gone = await client.get("/v1/messages/batches", headers=key)
        assert (gone.status_code, gone.json()["error"]["type"]) == (404, "not_found_error")


async def test_errors_of_the_framework_have_openais_form_too(client: httpx.AsyncClient) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for method, path, status in (("GET", "/nothing", 404), ("DELETE", "/v1/models", 405)):
        answer = await client.request(method, path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)


def test_routes_that_are_refused_are_routes_of_vllm(app: FastAPI) -> None:
    known = {route.path for route in app.routes if isinstance(route, APIRoute)}
    assert set(NOT_HERE) <= known


async def test_the_flag_lets_scrapers_in_without_a_key() -> None:
    transport = httpx.ASGITransport(application("--metrics-without-key"))
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401


# What no flag makes: routes of pooling and of speech, whose models are refused at the start.
OTHER_MODELS = re.compile(r"/classify|/v1/embeddings|/v2/embed|/v1/audio/.*|/v1/realtime")


def documented() -> dict[str, str]:
    """docs/routes.md: for each "METHOD /path" what it says of several instances."""
    text = (File(__file__).parents[2] / "docs" / "routes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z]+ \S+)` \|.*\| (.*) \|$", text, re.MULTILINE)
    return dict(rows)


def test_the_table_of_routes_is_the_route_table_of_the_application(app: FastAPI) -> None:
    online = application("--profiler-config", '{"profiler": "torch", "torch_profiler_dir": "/tmp"}')
    found = set()
    for route in (*app.routes, *online.routes):
        path = route.path.replace("request_id:path", "id")
        methods = getattr(route, "methods", None) or {"GET"}
        found |= {f"{method} {path}" for method in methods - {"HEAD"} if not OTHER_MODELS.fullmatch(path)}
    assert found == set(documented())


def test_the_table_says_501_of_what_is_refused_and_of_nothing_else() -> None:
    assert {row.split()[1] for row, says in documented().items() if says == "501"} == set(NOT_HERE)


async def test_http_requests_are_counted_by_vllms_own_metrics_though_the_stack_is_built_anew() -> None:
    there = REGISTRY._names_to_collectors
    for collector in {there[name] for name in list(there) if name.startswith("http_")}:
        REGISTRY.unregister(collector)  # of applications before this one
    transport = httpx.ASGITransport(application(development=False), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        answer = await client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    labels = {"handler": "/v1/models", "method": "GET", "status": f"{answer.status_code // 100}xx"}
    assert REGISTRY.get_sample_value("http_requests_total", labels) == 1
