"""uvicorn's connection with bounds on what comes before there is a request, and an end that is heard.

The guard sees a request when its headers are complete. Until then it is this connection that must not
collect for ever: uvicorn's fast parser has no limit of its own. An answer that is given before the body was
read would be lost if the connection were just closed: the system resets it, and the client sees only that.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from vllm.entrypoints.launchers.utils.constants import H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT

from taichi_serve.frontend import anthropic_form

MAX_HEAD = 64 << 10
HEAD_SECONDS = 30.0
# How long, and how many bytes, a client that was refused may go on sending before it is cut off.
PARTING_SECONDS = 2.0
PARTING_BYTES = 32 << 20


class Parting:
    """A transport whose `close` asks the connection first: it may want to hear the other side out."""

    def __init__(self, transport: asyncio.Transport, part: Callable[[], bool]) -> None:
        self._transport = transport
        self._part = part
        self.write = transport.write  # the path of every token

    def close(self) -> None:
        """Close now, or when the connection has parted."""
        if not self._part():
            self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """At most `MAX_HEAD` bytes of request line and headers, all there within `HEAD_SECONDS`.

    `--h11-max-incomplete-event-size` is another number of bytes where somebody has set it.
    """

    head_seconds = HEAD_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        asked: Any = getattr(self.config, "h11_max_incomplete_event_size", None)
        unsaid = asked in (None, H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT)
        self._max_head = MAX_HEAD if unsaid else int(asked)
        self._begun = False  # a head has begun and is not complete
        self._head = 0  # bytes read since
        self._late: asyncio.TimerHandle | None = None
        self._parting = 0  # bytes that may still come in, and are dropped

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A connection on which nothing is asked does not stay either."""
        self._raw = transport
        super().connection_made(Parting(transport, self._part))
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """No more waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and see that what is left of a head stays within its bounds."""
        if self._parting:
            self._parting -= len(data)
            if self._parting <= 0:
                self._raw.close()
            return
        self._head += len(data)
        super().data_received(data)
        if not self._begun:
            self._head = 0
        elif self._head > self._max_head and not self._raw.is_closing():
            self._refuse(431, f"The headers are above {self._max_head} bytes.")

    def on_message_begin(self) -> None:
        """The first byte of a head."""
        super().on_message_begin()
        self._begun = True
        self._wait()

    def on_headers_complete(self) -> None:
        """From here on it is the guard's."""
        self._begun = False
        self._stop_waiting()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets uvicorn's words, in OpenAI's form or Anthropic's."""
        self._refuse(400, msg)

    def _wait(self) -> None:
        self._stop_waiting()
        self._late = self.loop.call_later(self.head_seconds, self._too_late)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        if self._begun:
            self._refuse(408, f"The headers were not there within {self.head_seconds:g} seconds.")
        else:
            self._raw.close()

    def _part(self) -> bool:
        """Whether somebody may still be sending; then the connection closes when they stop, or later."""
        sending = self._begun or (self.cycle is not None and self.cycle.more_body)
        if self._parting or not sending or self._raw.is_closing():
            return bool(self._parting)
        self._parting = PARTING_BYTES
        if self._raw.can_write_eof():
            self._raw.write_eof()
        self._stop_waiting()
        self._late = self.loop.call_later(PARTING_SECONDS, self._raw.close)
        self.flow.resume_reading()
        return True

    def _path(self) -> str:
        """The path of the request that was begun last, as far as it is known: it may not be there in full, or
        be none."""
        try:
            return unquote(urlsplit((self.url or b"").decode("latin-1")).path)
        except ValueError:
            return ""

    def _refuse(self, status: int, message: str) -> None:
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self._raw.close()  # an answer is under way: nothing may be written into it
            return
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": status}
        body = json.dumps({"error": error}).encode()
        if anthropic_form.serves(self._path()):
            body = anthropic_form.reworded(status, body)
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()
