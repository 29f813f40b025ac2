"""What a client gets whose request is turned away, whatever its route made of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
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

from taichi_serve.frontend import names
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


async def stream(name: str, away: bool, before: bool) -> AsyncIterator[str]:
    if before:
        yield "data: created\n\n"
    KNOWN.note(name, name)
    if away:
        KNOWN.turn_away(name, 3.2)
        yield 'data: {"error": "overloaded"}\n\n'
    else:
        yield "data: a token\n\n"
    yield "data: [DONE]\n\n"


async def generate(request: Request) -> Response:
    asked = request.query_params
    parts = stream("r", "away" in asked, "before" in asked)
    if "whole" in asked:
        texts = [text async for text in parts]
        if "away" in asked:
            return JSONResponse({"error": "overloaded"}, 503)
        return JSONResponse(texts)
    return StreamingResponse(parts, media_type="text/event-stream")


async def asked(query: str) -> httpx.Response:
    routes = [Route("/generate", generate), Route("/health", lambda _: Response(status_code=200))]
    app: Any = Starlette(routes=routes, middleware=[Middleware(Door), Middleware(TurnedAway)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        return await client.get(query)


@pytest.mark.parametrize("query", ["/generate?away", "/generate?away&before", "/generate?away&whole"])
async def test_who_is_turned_away_gets_a_503_that_says_when_to_come_back(query: str) -> None:
    answer = await asked(query)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "4"
    assert answer.json()["error"]["type"] == "overloaded_error"
    assert answer.json()["error"]["code"] == 503


@pytest.mark.parametrize("query", ["/generate", "/generate?before", "/generate?whole"])
async def test_who_is_not_gets_every_byte_of_the_answer(query: str) -> None:
    answer = await asked(query)
    assert answer.status_code == 200
    assert "a token" in answer.text
    assert "[DONE]" in answer.text
    assert ("created" in answer.text) == ("before" in query)


async def test_an_answer_without_a_body_is_not_kept_back() -> None:
    assert (await asked("/health")).status_code == 200
