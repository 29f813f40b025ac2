"""What the guard answers at the door, and what it lets in, around an application that counts what it gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from taichi_serve.frontend.body import MAX_BODY, Intake
from taichi_serve.frontend.elsewhere import NOT_HERE
from taichi_serve.frontend.guard import MAX_HEADERS, Guard
from taichi_serve.frontend.keys import Keys

PATH = "/v1/completions"
MIB = 1 << 20


class Door:
    """An application behind the guard, and the bodies that got in."""

    def __init__(
        self, *keys: str, intake: Intake | None = None, metrics_open: bool = False, root_path: str = ""
    ) -> None:
        self.got: list[bytes] = []
        self.closing = False
        self.status = 200
        self.back_in: int | None = None  # seconds until an instance is expected back
        self.intake = intake or Intake()
        methods = ["GET", "POST", "PATCH", "OPTIONS", "DELETE"]
        self.app = Starlette(
            routes=[
                WebSocketRoute("/{rest:path}", self._talk),
                Route("/{rest:path}", self._take, methods=methods),
            ],
            middleware=[
                Middleware(
                    Guard,
                    keys=Keys(list(keys), metrics_open),
                    intake=self.intake,
                    closing=lambda: self.closing,
                    retry_after=lambda: self.back_in,
                )
            ],
        )
        transport = httpx.ASGITransport(self.app, root_path=root_path)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://door")

    async def _take(self, request: Request) -> Response:
        self.got.append(await request.body())
        return JSONResponse({}, status_code=self.status)

    async def _talk(self, socket: WebSocket) -> None:
        await socket.accept()

    async def post(self, body: bytes, path: str = PATH, **headers: str) -> httpx.Response:
        return await self.client.post(path, content=body, headers=headers)


def check(answer: httpx.Response, status: int, kind: str) -> str:
    """OpenAI's form of an error; returns its message."""
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == (status, kind)
    message: str = error["message"]
    return message


async def pieces(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // MIB):
        yield b" " * MIB
    yield b" " * (size % MIB)


async def test_a_good_body_gets_in_as_it_is() -> None:
    door = Door()
    body = '{"prompt": "한국어 \\u2603 emoji 🙂"}'.encode()
    assert (await door.post(body)).status_code == 200
    assert door.got == [body]


# ------------------------------------------------------------------------------------------------------ key


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("Bearer right", 200),
        ("bearer other", 200),
        ("Bearer wrong", 401),
        ("Bearer rightother", 401),
        ("right", 401),
        ("Basic right", 401),
        ("Bearer ", 401),
        (None, 401),
    ],
)
async def test_every_path_asks_for_one_of_the_keys(sent: str | None, status: int) -> None:
    door = Door("right", "other")
    headers = {} if sent is None else {"Authorization": sent}
    for path in (
        "/taichi/state",
        "/v1/models",
        "/invocations",
        "/docs",
        "/",
        "/nothing",
        "/health/",
        "/metrics",
    ):
        answer = await door.client.get(path, headers=headers)
        assert answer.status_code == status, path
    assert len(door.got) == (8 if status == 200 else 0)


async def test_health_and_its_like_are_open_and_metrics_only_by_the_flag() -> None:
    for path in ("/health", "/live", "/ready", "/ping", "/version"):
        assert (await Door("k").client.get(path)).status_code == 200
    for path in ("/metrics", "/metrics/"):
        assert (await Door("k").client.get(path)).status_code == 401
        assert (await Door("k", metrics_open=True).client.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/healthy", "/health/x", "/v1/health", "/health;x", "//health", "/HEALTH"])
async def test_a_path_that_only_looks_open_is_not(path: str) -> None:
    assert (await Door("k", metrics_open=True).client.get(path)).status_code == 401


async def test_behind_a_proxys_prefix_the_same_paths_are_open() -> None:
    door = Door("k", root_path="/llm")
    assert (await door.client.get("/llm/health")).status_code == 200
    assert (await door.client.get("/llm/v1/models")).status_code == 401


async def test_other_methods_ask_for_the_key_but_for_a_browsers_preflight() -> None:
    door = Door("k")
    for method in ("HEAD", "OPTIONS", "DELETE", "PATCH", "PUT", "TRACE"):
        assert (await door.client.request(method, PATH)).status_code == 401, method
    asks = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    assert (await door.client.request("OPTIONS", PATH, headers=asks)).status_code == 200
    assert (await door.client.request("POST", PATH, headers=asks)).status_code == 401


@pytest.mark.parametrize(("sent", "opens"), [(b"Bearer k", True), (b"Bearer x", False), (None, False)])
async def test_a_websocket_without_the_key_is_closed_before_it_is_one(
    sent: bytes | None, opens: bool
) -> None:
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    headers = [] if sent is None else [(b"authorization", sent)]
    scope = {"type": "websocket", "path": "/v1/realtime", "headers": headers, "query_string": b""}
    await Door("k").app(scope, receive, send)
    assert said[0]["type"] == ("websocket.accept" if opens else "websocket.close")


async def test_the_key_is_asked_before_the_body_is_read() -> None:
    door = Door("k")

    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        raise AssertionError("the body was read")

    answer = await door.client.post(PATH, content=never())
    assert check(answer, 401, "authentication_error")
    assert answer.headers["connection"] == "close"


async def test_where_no_key_is_asked_no_body_is_read_either() -> None:
    door = Door("k")
    assert (await door.post(b" " * (MAX_BODY + 1), "/ping")).status_code == 200
    assert door.got == [b""]


async def test_without_keys_everything_is_open() -> None:
    for path in ("/taichi/state", "/v1/models"):
        assert (await Door().client.get(path)).status_code == 200


# ----------------------------------------------------------------------------------------------- the headers


async def test_a_data_parallel_rank_in_a_header_is_refused_on_every_route_and_method() -> None:
    door = Door()
    for method, path in (("POST", PATH), ("GET", "/v1/models"), ("PATCH", "/taichi/sliders")):
        answer = await door.client.request(method, path, headers={"X-Data-Parallel-Rank": "1"})
        assert "x-data-parallel-rank" in check(answer, 400, "invalid_request_error")
    assert door.got == []


async def test_headers_are_counted() -> None:
    door = Door()
    few = {f"x-{number}": "y" for number in range(MAX_HEADERS - 10)}
    assert (await door.client.get("/v1/models", headers=few)).status_code == 200
    many = {f"x-{number}": "y" for number in range(10_000)}
    check(await door.client.get("/v1/models", headers=many), 431, "invalid_request_error")


# ------------------------------------------------------------------------------------------------------ body


async def test_the_limit_is_16_mib_to_the_byte_announced_or_not() -> None:
    door = Door()
    assert (await door.post(b" " * MAX_BODY)).status_code == 200
    check(await door.post(b" " * (MAX_BODY + 1)), 413, "invalid_request_error")
    assert (await door.client.post(PATH, content=pieces(MAX_BODY))).status_code == 200
    check(await door.client.post(PATH, content=pieces(MAX_BODY + 1)), 413, "invalid_request_error")
    assert len(door.got) == 2
    assert door.intake.held == 0


async def test_a_length_of_very_many_digits_is_too_large() -> None:
    check(await Door().post(b"", **{"content-length": "9" * 5000}), 413, "invalid_request_error")


async def test_a_body_that_does_not_end_has_a_deadline() -> None:
    door = Door(intake=Intake(seconds=0.05))

    async def trickle() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    answer = await door.client.post(PATH, content=trickle())
    assert "0.05 seconds" in check(answer, 408, "timeout_error")
    assert answer.headers["connection"] == "close"
    assert (door.got, door.intake.held) == ([], 0)


async def test_bodies_that_are_being_read_have_a_budget_together() -> None:
    door = Door(intake=Intake(budget=5 * MIB))
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b" " * (4 * MIB)
        arrived.set()
        await go_on.wait()
        yield b" "

    first = asyncio.create_task(door.client.post(PATH, content=slow()))
    await arrived.wait()
    answer = await door.client.post(PATH, content=pieces(2 * MIB))
    assert check(answer, 503, "overloaded_error")
    assert int(answer.headers["retry-after"]) >= 1
    assert (await door.post(b" " * MIB)).status_code == 200  # a small one still fits
    go_on.set()
    assert (await first).status_code == 200
    assert (await door.client.post(PATH, content=pieces(4 * MIB))).status_code == 200
    assert door.intake.held == 0


async def test_of_a_client_that_leaves_in_the_middle_nothing_gets_in() -> None:
    door = Door()
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b""}

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError(f"nobody would hear {message}")

    await door.app(scope, receive, send)
    assert (door.got, door.intake.held) == ([], 0)


# ------------------------------------------------------------------------------------- elsewhere, and the end


@pytest.mark.parametrize("path", NOT_HERE)
async def test_what_means_one_engine_is_answered_with_501_and_a_sentence(path: str) -> None:
    door = Door("k")
    assert (await door.post(b"", path)).status_code == 401
    message = check(await door.post(b"", path, Authorization="Bearer k"), 501, "not_implemented_error")
    assert message.endswith(".")
    assert door.got == []


async def test_while_the_server_ends_new_work_is_refused_and_the_rest_is_not() -> None:
    door = Door()
    door.closing = True
    answer = await door.post(b"{}")
    check(answer, 503, "overloaded_error")
    assert answer.headers["retry-after"] == "5"
    for path in ("/taichi/requests/x/flow", "/ping", "/abort_requests", "/v1/responses/x/cancel"):
        assert (await door.post(b"{}", path)).status_code == 200, path
    assert (await door.client.get("/metrics")).status_code == 200


@pytest.mark.parametrize(
    ("status", "seconds", "said"), [(503, None, "1"), (503, 7, "7"), (200, 7, None), (500, 7, None)]
)
async def test_whoever_says_503_says_when_to_come_back(
    status: int, seconds: int | None, said: str | None
) -> None:
    door = Door()
    door.status, door.back_in = status, seconds
    assert (await door.post(b"{}")).headers.get("retry-after") == said
