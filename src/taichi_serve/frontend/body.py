"""Bodies on their way in: each within a size and a time, all of them together within a budget."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Message, Receive

from taichi_serve.frontend.errors import RETRY_AFTER, unread

MAX_BODY = 16 << 20
BUDGET = 256 << 20
SECONDS = 30.0


class Intake:
    """Reads bodies. `limit` and `budget` are bytes, of one body and of all that are being read.

    `seconds` is what a body may take from the end of its headers to its last byte.
    """

    def __init__(self, limit: int = MAX_BODY, budget: int = BUDGET, seconds: float = SECONDS) -> None:
        self.limit = limit
        self.budget = budget
        self.seconds = seconds
        self.held = 0

    async def read(self, receive: Receive, headers: Headers) -> bytes | JSONResponse | None:
        """The whole body, an answer to one that may not come in, or None where the client has left."""
        declared = headers.get("content-length", "")
        # More digits than Python converts are too large, too.
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self.limit):
            return self._too_large()
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self.seconds):
                return await self._collect(receive, parts)
        except TimeoutError:
            return unread(408, "timeout_error", f"The body was not there within {self.seconds:g} seconds.")
        finally:
            self.held -= sum(map(len, parts))

    async def _collect(self, receive: Receive, parts: list[bytes]) -> bytes | JSONResponse | None:
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > self.limit:
                return self._too_large()
            self.held += len(part)
            parts.append(part)
            if self.held > self.budget:
                return unread(
                    503, "overloaded_error", "Too many large bodies at once.", retry_after=RETRY_AFTER
                )
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self) -> JSONResponse:
        return unread(413, "invalid_request_error", f"The body is above {self.limit} bytes.")


def replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """A `receive` that hands out this body, and then what comes after it: a disconnect, sooner or later."""
    left: list[bytes] = [body]

    async def replayed() -> Message:
        if left:  # popped, so that the body lives no longer than its request needs it
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        while (message := await receive())["type"] == "http.request":
            pass  # what was not read at the door stays outside
        return message

    return replayed
