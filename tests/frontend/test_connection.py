"""A real connection: what comes before there is a request is bounded in size and time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from taichi_serve.frontend.connection import MAX_HEAD, Connection


class Hasty(Connection):
    """As the real one, with less patience."""

    head_seconds = 0.2


@contextlib.asynccontextmanager
async def serving(kind: type[Connection] = Connection) -> AsyncIterator[int]:
    async def count(request: Request) -> JSONResponse:
        return JSONResponse(len(await request.body()))

    app = Starlette(routes=[Route("/", count, methods=["GET", "POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=kind, log_level="error", lifespan="off"))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup()
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        await server.shutdown()


async def talk(port: int, *parts: bytes) -> tuple[int, Any]:
    """Say this; the status and the JSON that come back before the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await writer.drain()
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, json.loads(body) if body else None


END = b"Host: x\r\nConnection: close\r\n\r\n"


async def test_requests_are_served_one_after_the_other_and_large_bodies_are_no_heads() -> None:
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for size in (10, 4 * MAX_HEAD, 0):
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            assert int(await reader.readexactly(length)) == size
        writer.close()


@pytest.mark.parametrize(
    "endless",
    [b"GET /" + b"x" * 2 * MAX_HEAD, b"GET / HTTP/1.1\r\nX: " + b"y" * 2 * MAX_HEAD, None],
    ids=["target", "header", "headers"],
)
async def test_a_head_that_does_not_end_is_refused(endless: bytes | None) -> None:
    many = b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(2 * MAX_HEAD // 8))
    async with serving() as port:
        status, said = await talk(port, endless or many)
    assert (status, said["error"]["code"]) == (431, 431)


async def test_a_head_that_comes_slowly_has_a_deadline() -> None:
    async with serving(Hasty) as port:
        status, said = await talk(port, b"GET / HTTP/1.1\r\nX: ")
        assert (status, said["error"]["code"]) == (408, 408)
        assert await talk(port) == (0, None)  # nobody asked anything: it just ends
        assert await talk(port, b"GET / HTTP/1.1\r\n" + END) == (200, 0)


@pytest.mark.parametrize(
    "words",
    [
        b"what is this\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_no_http_gets_an_error_in_openais_form(words: bytes) -> None:
    async with serving() as port:
        status, said = await talk(port, words)
    assert (status, said["error"]["type"]) == (400, "invalid_request_error")


LONG = b"X: " + b"x" * (MAX_HEAD + 1)
CHUNKED = b"Host: x\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n"


@pytest.mark.parametrize(
    ("target", "anthropics"),
    [
        (b"/v1/messages", True),
        (b"/v1/messages?beta=true", True),
        (b"/v1/messages/count_tokens", True),
        (b"http://here/v1/m%65ssages", True),
        (b"/v1/messages-of-mine", False),
        (b"/v1/chat/completions?x=/v1/messages", False),
        (b"/", False),
    ],
)
async def test_what_is_refused_before_there_is_a_request_has_the_form_of_its_path(
    target: bytes, anthropics: bool
) -> None:
    first = b"POST " + target + b" HTTP/1.1\r\n"
    async with serving(Hasty) as port:
        for status, kind, parts in (
            (431, "invalid_request_error", [first + LONG]),
            (408, "timeout_error", [first]),
            (400, "invalid_request_error", [first + b"no header\r\n\r\n"]),
            (400, "invalid_request_error", [first + CHUNKED]),
        ):
            said = await talk(port, *parts)
            assert said[0] == status
            if anthropics:
                assert said[1]["type"] == "error"
                assert said[1]["error"]["type"] == kind
                assert set(said[1]["error"]) == {"type", "message"}
            else:
                assert said[1]["error"]["code"] == status


async def test_a_request_line_that_is_none_has_no_path_and_not_that_of_the_request_before() -> None:
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/messages HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.write(b"\x00\x01 nothing\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        refused = answer[answer.index(b"HTTP/1.1 400") :]
        assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["code"] == 400
