"""A server of one route for tests of the load: it streams as many tokens as it is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

STATE = json.dumps(
    {"data": [{"id": "tiny", "max_model_len": 4096}], "version": "0", "requests": {"live": 0}}
).encode()  # of every route that is read
ANY = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"


class Answering:
    """HTTP/1.1 on a free port of this host, in the event loop of the test.

    Requests with the prompt lengths in `never` are not answered; every token takes `pause` seconds.
    """

    def __init__(self, never: frozenset[int] = frozenset(), pause: float = 0.0, ids: bool = True) -> None:
        self.never, self.pause, self.ids = never, pause, ids
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.at: list[float] = []
        self.clients: set[int] = set()  # ports, one for each connection
        self.cut = 0
        self.asked = asyncio.Event()  # set with the first request that is not answered

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Answering]:
        """While it serves."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients.add(writer.get_extra_info("peername")[1])
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError, BrokenPipeError):
            while True:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
                head = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
                data = await reader.readexactly(int(head.get("content-length", 0)))
                if first.startswith("GET"):
                    writer.write(ANY % (len(STATE), STATE))
                    continue
                self.at.append(time.perf_counter())
                self.heads.append(head)
                self.bodies.append(json.loads(data))
                await self._answer(self.bodies[-1], reader, writer)
        writer.close()

    async def _answer(
        self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if len(body["prompt"]) in self.never:
            self.asked.set()
            with contextlib.suppress(ConnectionResetError):
                await reader.read(1)  # the end of the connection
            self.cut += 1
            raise ConnectionResetError
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        count = body["max_tokens"]
        for number in range(count):
            await asyncio.sleep(self.pause)
            if writer.is_closing():
                return
            finish = "length" if number + 1 == count else None
            ids = {"token_ids": [5000 + number]} if self.ids else {}
            _event(writer, {"id": "a", "choices": [{"text": "x", "finish_reason": finish, **ids}]})
        _event(writer, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count}})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()


def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    text = f"data: {json.dumps(event)}\n\n".encode()
    writer.write(f"{len(text):x}\r\n".encode() + text + b"\r\n")
