"""The door: the key first, then the headers, then a body that comes in time and within its limits.

It is the outermost of all middleware, so nothing of vLLM's, and nothing that an operator adds, sees a request
that is refused here. What the parsed body may say is looked at later (parsed.py).
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from taichi_serve.frontend import anthropic_form, names
from taichi_serve.frontend.body import Intake, replay
from taichi_serve.frontend.elsewhere import NOT_HERE
from taichi_serve.frontend.errors import RETRY_AFTER, SHUTTING_DOWN, unread
from taichi_serve.frontend.internal import HEADERS
from taichi_serve.frontend.keys import Keys, path_of
from taichi_serve.frontend.terms import Promises, TermsError, note, noted, said

MAX_HEADERS = 256
WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")
# Seconds after which a client may ask again while this server ends; another one may answer then.
ENDING_RETRY_AFTER = 5


class Guard:
    """Pure ASGI middleware. It reads a body once, within its limits, and replays it to the application."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        intake: Intake,
        closing: Callable[[], bool] = lambda: False,
        max_headers: int = MAX_HEADERS,
        retry_after: Callable[[], int | None] = lambda: None,
        promises: Promises | None = None,
    ) -> None:
        """`retry_after` is in how many seconds an instance is expected back, while none lives. With
        `promises` requests may bring an SLO."""
        self.app = app
        self._keys = keys
        self._intake = intake
        self._closing = closing
        self._max_headers = max_headers
        self._retry_after = retry_after
        self._promises = promises

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer at the door, or let the request in."""
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            names.asking.set(scope.setdefault("state", {}))
            send = anthropic_form.sending(send) if anthropic_form.spoken(scope) else send
            await self._http(scope, receive, self._telling(self._with_retry_after(send)))
        else:
            await self.app(scope, receive, send)

    def _with_retry_after(self, send: Send) -> Send:
        """Whoever says 503 says when to come back, vLLM's routes too."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 503:
                headers = message.setdefault("headers", [])
                if not any(name.lower() == b"retry-after" for name, _ in headers):
                    seconds = self._retry_after() or RETRY_AFTER
                    message = {**message, "headers": [*headers, (b"retry-after", b"%d" % seconds)]}
            await send(message)

        return sent

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys.admit(scope, Headers(scope=scope)):
            await self.app(scope, receive, send)
        else:
            await send(
                {"type": "websocket.close", "code": 1008, "reason": "The API key is missing or wrong."}
            )

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        body: bytes | JSONResponse | None = self._refuse(scope, headers)
        if body is None and (scope["method"] in WITHOUT_BODY or self._keys.open(scope)):
            body = b""
        elif body is None:
            body = await self._intake.read(receive, headers)
        match body:
            case bytes():
                await self.app(scope, replay(body, receive), send)
            case JSONResponse():
                await body(scope, receive, send)
            case None:
                pass  # the client has left: nobody would hear an answer

    def _refuse(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        path = path_of(scope)
        if len(headers.raw) > self._max_headers:
            return unread(431, "invalid_request_error", f"There are more than {self._max_headers} headers.")
        if not self._keys.admit(scope, headers):
            answer = unread(401, "authentication_error", "The API key is missing or wrong.")
            answer.headers["WWW-Authenticate"] = "Bearer"
            return answer
        for name in HEADERS:
            if name in headers:
                return unread(400, "invalid_request_error", f"{name} cannot be set by a client.", name)
        if (why := NOT_HERE.get(path)) is not None:
            return unread(501, "not_implemented_error", why)
        new_work = scope["method"] not in WITHOUT_BODY and not _ends_or_steers(path)
        return self._agree(headers) if new_work else None

    def _agree(self, headers: Headers) -> JSONResponse | None:
        """Note the terms of a request that makes new work, or refuse it."""
        if self._closing():
            return unread(503, "overloaded_error", SHUTTING_DOWN, None, ENDING_RETRY_AFTER)
        try:
            if self._promises is not None:
                note(self._promises.of(headers))
        except TermsError as wrong:
            return unread(400, "invalid_request_error", str(wrong), wrong.header)
        return None

    def _telling(self, send: Send) -> Send:
        promises = self._promises
        if promises is None or not promises.tell:
            return send

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and (terms := noted()) is not None:
                headers = [*message.get("headers", []), *said(terms, promises.server())]
                message = {**message, "headers": headers}
            await send(message)

        return sent


def _ends_or_steers(path: str) -> bool:
    """Whether a request makes no new work: it is taken while the server ends, too."""
    return path.startswith("/taichi/") or path == "/ping" or path.endswith(("/abort_requests", "/cancel"))
