"""What a client of Anthropic's API gets to see of an error, and of an answer that is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("starlette")

from starlette.types import Message

from taichi_serve.frontend.anthropic_form import kind, reworded, sending, spoken

OPENAIS = {"error": {"message": "It is 忙.", "type": "overloaded_error", "param": None, "code": 503}}


async def through(status: int, *bodies: bytes, **headers: str) -> list[Message]:
    """What comes out of an answer with these bodies."""
    out: list[Message] = []

    async def send(message: Message) -> None:
        out.append(message)

    passing = sending(send)
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await passing({"type": "http.response.start", "status": status, "headers": raw})
    for number, body in enumerate(bodies, 1):
        await passing({"type": "http.response.body", "body": body, "more_body": number < len(bodies)})
    return out


def error(body: bytes) -> Any:
    return json.loads(body)


async def test_an_error_in_openais_form_comes_out_in_anthropics_with_the_headers_that_it_had() -> None:
    body = json.dumps(OPENAIS).encode()
    start, last = await through(503, body, retry_after="7", content_length=str(len(body)))
    assert error(last["body"]) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "It is 忙."},
    }
    headers = dict(start["headers"])
    assert (start["status"], headers[b"retry-after"]) == (503, b"7")
    assert headers[b"content-length"] == str(len(last["body"])).encode()
    assert len(start["headers"]) == 3  # the length is there once


async def test_an_error_that_comes_in_pieces_is_one_error() -> None:
    body = json.dumps(OPENAIS).encode()
    _, last = await through(503, body[:10], body[10:], b"")
    assert error(last["body"])["error"]["message"] == "It is 忙."


async def test_an_answer_that_is_no_error_goes_out_as_it_comes() -> None:
    parts = b'data: {"error": "in a stream"}\n\n', b"data: 2\n\n"
    start, *bodies = await through(200, *parts, content_type="text/event-stream")
    assert start["status"] == 200
    assert tuple(body["body"] for body in bodies) == parts


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"type": "error", "error": {"type": "BadRequestError", "message": "no"}}', "no"),  # vLLM's words
        (b"Internal Server Error", "Internal Server Error"),
        (b'{"detail": "x"}', '{"detail": "x"}'),
        (b"[1]", "[1]"),
        (b"\xff", "\N{REPLACEMENT CHARACTER}"),
        (b"", ""),
    ],
)
def test_whatever_an_error_says_becomes_its_message(body: bytes, message: str) -> None:
    assert error(reworded(500, body))["error"] == {"type": "api_error", "message": message}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, "invalid_request_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (501, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_the_type_of_an_error_is_that_of_its_status(status: int, expected: str) -> None:
    assert kind(status) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/messages", True),
        ("/proxied/v1/messages/count_tokens", True),
        ("/v1/messages-of-mine", False),
        ("/v1/chat/completions", False),
    ],
)
def test_anthropics_form_is_for_anthropics_routes(path: str, expected: bool) -> None:
    root = "/proxied" if path.startswith("/proxied") else ""
    assert spoken({"type": "http", "path": path, "root_path": root}) is expected
