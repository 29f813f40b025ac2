"""Requests that are turned away: 503 with Retry-After before the first byte of their answer.

The scheduler turns away who would be late (`--overload`), vLLM's front end who is one too many
(`--max-num-queued-reqs`, `--max-num-queued-tokens`). vLLM's routes begin a stream, with status 200, before
either has seen the request, so an error would be the last event of a stream that looked good. Here the
beginning of an answer is kept back until the first of it comes that an engine, or a refusal, brought about.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from taichi_serve.frontend.errors import error
from taichi_serve.frontend.names import asked_in, not_taken_in

OVERLOADED = "The server is overloaded: this request would not get its first token in time. Try again later."
WITHOUT_WORK = ("GET", "HEAD", "OPTIONS")
MOST = 1 << 16  # bytes that are kept back


class TurnedAway:
    """Pure ASGI middleware; it looks at the answers of requests that reach the scheduler, or would have."""

    def __init__(self, app: ASGIApp, drained: Callable[[], float] = lambda: 0.0) -> None:
        """`drained` is in how many seconds the first instance is through with all that is queued there now:
        when to come back, for those of whom the scheduler does not know."""
        self.app = app
        self._drained = drained

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through, and keep the beginning of the answer back. Whoever only looks (the live page) is
        in nobody's way, and sees what there is to see at once."""
        if scope["type"] == "http" and scope["method"] not in WITHOUT_WORK:
            send = _KeptBack(scope, receive, send, self._drained).sent
        await self.app(scope, receive, send)


class _KeptBack:
    """One answer: kept back, then let go of, or replaced."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, drained: Callable[[], float]) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._drained = drained
        self._held: list[Message] = []
        self._bytes = 0
        self._open = self._replaced = False

    async def sent(self, message: Message) -> None:
        """Take a part of the answer."""
        if self._replaced:
            return
        if self._open:
            await self._send(message)
            return
        if (refused := self._refused()) is not None:
            self._replaced = True
            why, seconds = refused
            whole = max(1, math.ceil(seconds))
            answer = error(HTTPStatus.SERVICE_UNAVAILABLE, "overloaded_error", why, None, whole)
            await answer(self._scope, self._receive, self._send)
            return
        self._held.append(message)
        self._bytes += len(message.get("body", b""))
        begins = message["type"] == "http.response.start"
        early = asked_in(self._scope) is None and message.get("more_body", False) and self._bytes < MOST
        if not (begins or early):
            self._open = True
            for held in self._held:
                await self._send(held)
            self._held.clear()

    def _refused(self) -> tuple[str, float] | None:
        """Why, and after how many seconds it may come back; None where it was not turned away."""
        asked = asked_in(self._scope)
        if asked is not None and asked.retry_after is not None:
            return OVERLOADED, asked.retry_after
        why = not_taken_in(self._scope)
        return None if why is None else (why, self._drained())
