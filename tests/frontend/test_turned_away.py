"""What a client gets whose request is turned away, whatever its route made of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.exceptions import QueueOverflowError

from taichi_serve.frontend import names
from taichi_serve.frontend.client import ClusterLLM
from taichi_serve.frontend.turned_away import TurnedAway


class Door:
    """What the guard does of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            names.asking.set(scope.setdefault("state", {}))
        await self.app(scope, receive, send)


KNOWN = names.Names()


async def stream(name: str, away: bool, before: bool, full: bool) -> AsyncIterator[str]:
    if before:
        yield "data: created\n\n"
    if full:  # of its prompts the second is one too many, or its only one
        if before:
            KNOWN.note(name, name)
        names.not_taken("It is busy.")
        yield 'data: {"error": "busy"}\n\n'
        return
    KNOWN.note(name, name)
    if away:
        KNOWN.turn_away(name, 3.2)
        yield 'data: {"error": "overloaded"}\n\n'
    else:
        yield "data: a token\n\n"
    yield "data: [DONE]\n\n"


async def generate(request: Request) -> Response:
    asked = request.query_params
    parts = stream("r", "away" in asked, "before" in asked, "full" in asked)
    if "whole" in asked:
        texts = [text async for text in parts]
        if "away" in asked or "full" in asked:
            return JSONResponse({"error": "overloaded"}, 503)
        return JSONResponse(texts)
    return StreamingResponse(parts, media_type="text/event-stream")


async def asked(query: str) -> httpx.Response:
    routes = [
        Route("/generate", generate, methods=["POST"]),
        Route("/health", lambda _: Response(status_code=200)),
    ]
    within = Middleware(TurnedAway, drained=lambda: 6.5)
    app: Any = Starlette(routes=routes, middleware=[Middleware(Door), within])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        return await client.request("GET" if query == "/health" else "POST", query)


@pytest.mark.parametrize("query", ["/generate?away", "/generate?away&before", "/generate?away&whole"])
async def test_who_is_turned_away_gets_a_503_that_says_when_to_come_back(query: str) -> None:
    answer = await asked(query)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "4"
    assert answer.json()["error"]["type"] == "overloaded_error"
    assert answer.json()["error"]["code"] == 503


@pytest.mark.parametrize("query", ["/generate?full", "/generate?full&before", "/generate?full&whole"])
async def test_who_is_one_too_many_for_vllms_own_bound_is_told_when_what_is_queued_is_done(
    query: str,
) -> None:
    answer = await asked(query)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "7"
    assert answer.json()["error"] == {
        "message": "It is busy.",
        "type": "overloaded_error",
        "param": None,
        "code": 503,
    }


@pytest.mark.parametrize("query", ["/generate", "/generate?before", "/generate?whole"])
async def test_who_is_not_gets_every_byte_of_the_answer(query: str) -> None:
    answer = await asked(query)
    assert answer.status_code == 200
    assert "a token" in answer.text
    assert "[DONE]" in answer.text
    assert ("created" in answer.text) == ("before" in query)


@pytest.mark.parametrize(("open_requests", "why"), [(2, None), (3, "The engine is currently busy")])
def test_vllms_own_bound_is_noted_for_the_request_that_is_one_too_many(
    open_requests: int, why: str | None
) -> None:
    llm: Any = object.__new__(ClusterLLM)
    llm.scheduler_config = SimpleNamespace(max_num_queued_reqs=3, max_num_queued_tokens=None)
    llm.admission_stats = SimpleNamespace(get_num_requests=lambda: open_requests)
    llm.logger_manager = None
    scope: Scope = {"state": {}}
    token = names.asking.set(scope["state"])
    with contextlib.nullcontext() if why is None else pytest.raises(QueueOverflowError):
        llm.check_admission()
    names.asking.reset(token)
    noted = names.not_taken_in(scope)
    assert noted is None if why is None else noted is not None and noted.startswith(why)


async def test_an_answer_without_a_body_is_not_kept_back() -> None:
    assert (await asked("/health")).status_code == 200


@pytest.mark.parametrize(("method", "seen"), [("GET", ["start", "body"]), ("POST", [])])
async def test_who_only_looks_sees_a_stream_as_it_comes(method: str, seen: list[str]) -> None:
    """No engine has anything to do with it, and it does not end."""
    sent: list[str] = []

    async def updates(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})

    async def send(message: Any) -> None:
        sent.append(message["type"].removeprefix("http.response."))

    await TurnedAway(updates)({"type": "http", "method": method, "state": {}}, None, send)  # type: ignore[arg-type]
    assert sent == seen
