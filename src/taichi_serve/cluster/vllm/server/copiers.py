"""The server's end of an instance's copiers: all of its ranks as one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import zmq.asyncio

from taichi_serve.cluster.vllm.server.line import Line
from taichi_serve.cluster.vllm.wire import Copied, Failed, Order, Ping, Pong, Said, Word


class Copiers:
    """Orders go to every rank; a word is handed on once all ranks have said it, a failure at once."""

    def __init__(self, line: Line, hear: Callable[[Word], None]) -> None:
        self._context = zmq.asyncio.Context()
        self._hear = hear
        self.ranks = len(line.copiers)
        # By leg, until all of it is copied or dropped: how many ranks have said what.
        self._said: dict[str, Counter[tuple[int, bool]]] = {}
        self._pings = 0
        self._waiting: dict[int, list[Any]] = {}  # by number: who waits, and for how many ranks
        self._sockets: list[Any] = [line.copier(self._context, rank) for rank in range(self.ranks)]
        self._tasks = [asyncio.ensure_future(self._listen(socket)) for socket in self._sockets]

    def send(self, order: Order) -> None:
        """Never waits."""
        message = msgspec.msgpack.encode(order)
        for socket in self._sockets:
            socket.send(message)

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._take(msgspec.msgpack.decode(await socket.recv(), type=Said))

    def ping(self) -> asyncio.Future[None]:
        """Done when every rank's process has answered."""
        self._pings += 1
        done = asyncio.get_running_loop().create_future()
        self._waiting[self._pings] = [done, self.ranks]
        self.send(Ping(self._pings))
        return done

    def _take(self, word: Said) -> None:
        if isinstance(word, Pong):
            self._answered(word.number)
        elif isinstance(word, Failed):
            self._hear(word)
        else:
            said = self._said.setdefault(word.leg, Counter())
            what = (word.blocks, word.last) if isinstance(word, Copied) else (-1, True)
            said[what] += 1
            if said[what] == self.ranks:
                if what[1]:
                    del self._said[word.leg]
                self._hear(word)

    def _answered(self, number: int) -> None:
        waiting = self._waiting.get(number)
        if waiting is not None:
            waiting[1] -= 1
            if waiting[1] == 0:
                del self._waiting[number]
                if not waiting[0].done():
                    waiting[0].set_result(None)

    def close(self) -> None:
        """Hear nothing more."""
        for task in self._tasks:
            task.cancel()
        self._context.destroy(linger=0)
