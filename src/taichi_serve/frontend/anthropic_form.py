"""Errors of Anthropic's routes in the form of Anthropic's API, whoever worded them.

The door, our routes and vLLM's handlers of exceptions word every error in OpenAI's form; vLLM's own routes of
this API word some in Anthropic's, with types that Anthropic does not have. Here is one place that puts both
right, on the way out.
"""

from __future__ import annotations

import json

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Scope, Send

from taichi_serve.frontend.keys import path_of

ROUTE = "/v1/messages"
# What Anthropic's API calls them. 503 is not among its statuses: it says 529 of the same.
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def spoken(scope: Scope) -> bool:
    """Whether whoever asks here expects Anthropic's form."""
    return serves(path_of(scope))


def serves(path: str) -> bool:
    """Whether a path, without the prefix of a proxy, is one of Anthropic's."""
    return path == ROUTE or path.startswith(f"{ROUTE}/")


def kind(status: int) -> str:
    """The type of an error with this HTTP status."""
    return KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")


def reworded(status: int, body: bytes) -> bytes:
    """The body of an error in Anthropic's form, whose message is that of OpenAI's form or all of the body."""
    error = {"type": kind(status), "message": _message(body)}
    return json.dumps({"type": "error", "error": error}, ensure_ascii=False).encode()


def _message(body: bytes) -> str:
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    match said:
        case {"error": {"message": str(message)}}:
            return message
    return body.decode("utf-8", "replace")


def sending(send: Send) -> Send:
    """Pass an answer on, and reword it where it is an error: that is kept back until it is there in full."""
    begun: Message | None = None
    parts: list[bytes] = []

    async def sent(message: Message) -> None:
        nonlocal begun
        if message["type"] == "http.response.start" and message["status"] >= 400:
            begun = message
        elif begun is None or message["type"] != "http.response.body":
            await send(message)
        else:
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                start, begun = begun, None
                await _send(start, reworded(start["status"], b"".join(parts)), send)

    return sent


async def _send(start: Message, body: bytes, send: Send) -> None:
    headers = MutableHeaders(raw=[*start.get("headers", [])])
    headers["content-type"], headers["content-length"] = "application/json", str(len(body))
    await send({**start, "headers": headers.raw})
    await send({"type": "http.response.body", "body": body})
