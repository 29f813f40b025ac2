"""What never gets past the door: bodies that are too large, and parameters that only this system may set."""

from __future__ import annotations

import argparse
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

MAX_BODY = 16 << 20
INTERNAL_PARAMETERS = ("kv_transfer_params", "ec_transfer_params", "data_parallel_rank")
INTERNAL_HEADERS = ("x-data-parallel-rank",)
OURS = "/taichi"


def error(status: int, kind: str, message: str, parameter: str | None = None) -> JSONResponse:
    """An error in the form of the OpenAI API."""
    body = {"error": {"message": message, "type": kind, "param": parameter, "code": status}}
    return JSONResponse(body, status_code=status)


class Guard:
    """Pure ASGI middleware. It reads a body once, within its limit, and replays it to the application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._verify: Callable[[Headers], bool] | None = None
        self._knows_tokens = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer at the door, or let the request in."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not self._knows_tokens:
            self._learn_tokens(scope["app"].state.args)
        headers = Headers(scope=scope)
        refusal = self._refuse_headers(scope, headers)
        body = b""
        if refusal is None and scope["method"] in ("POST", "PUT", "PATCH"):
            read = await _read(receive, headers)
            if read is None:
                refusal = error(413, "invalid_request_error", f"The body is above {MAX_BODY} bytes.")
            else:
                body = read
                refusal = _refuse_body(body)
            receive = _replay(body, receive)
        await (refusal or self.app)(scope, receive, send)

    def _learn_tokens(self, args: argparse.Namespace) -> None:
        # vLLM makes this object from its name alone (--middleware), so it asks the application for the keys.
        self._knows_tokens = True
        if tokens := [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]:
            self._verify = AuthenticationMiddleware(self.app, tokens).verify_token

    def _refuse_headers(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith(OURS) and self._verify is not None and not self._verify(headers):
            return error(401, "authentication_error", "The API key is missing or wrong.")
        for name in INTERNAL_HEADERS:
            if name in headers:
                return error(400, "invalid_request_error", f"{name} cannot be set by a client.", name)
        return None


async def _read(receive: Receive, headers: Headers) -> bytes | None:
    """The whole body, or None as soon as it is known to be too large."""
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY:
        return None
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _refuse_body(body: bytes) -> JSONResponse | None:
    if not any(name.encode() in body for name in INTERNAL_PARAMETERS):
        return None
    try:
        data: Any = json.loads(body)
    except ValueError:
        return None  # vLLM words this error itself
    if not isinstance(data, dict):
        return None
    more = data.get("vllm_xargs")
    places = [data, more] if isinstance(more, dict) else [data]
    for name in INTERNAL_PARAMETERS:
        if any(place.get(name) is not None for place in places):
            return error(400, "invalid_request_error", f"{name} cannot be set by a client.", name)
    return None


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    first = True

    async def replayed() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()  # a disconnect, sooner or later

    return replayed
