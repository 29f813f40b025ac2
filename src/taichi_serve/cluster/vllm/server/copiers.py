"""The server's end of an instance's copiers: all of its ranks as one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from taichi_serve.cluster.vllm.wire import Copied, Failed, Order, Word, copier_endpoint


class Copiers:
    """Orders go to every rank; a word is handed on once all ranks have said it, a failure at once."""

    def __init__(self, directory: Path, engine_id: str, ranks: int, hear: Callable[[Word], None]) -> None:
        self._context = zmq.asyncio.Context()
        self._hear = hear
        self.ranks = ranks
        self._said: Counter[tuple[str, int, bool]] = Counter()
        self._sockets = []
        for rank in range(ranks):
            socket = self._context.socket(zmq.PAIR)
            socket.linger = 0
            socket.connect(copier_endpoint(directory, engine_id, rank))
            self._sockets.append(socket)
        self._tasks = [asyncio.ensure_future(self._listen(socket)) for socket in self._sockets]

    def send(self, order: Order) -> None:
        """Never waits."""
        message = msgspec.msgpack.encode(order)
        for socket in self._sockets:
            socket.send(message)

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._take(msgspec.msgpack.decode(await socket.recv(), type=Word))

    def _take(self, word: Word) -> None:
        if isinstance(word, Failed):
            self._hear(word)
            return
        key = (word.leg, word.blocks, word.last) if isinstance(word, Copied) else (word.leg, -1, True)
        self._said[key] += 1
        if self._said[key] == self.ranks:
            del self._said[key]
            self._hear(word)

    def close(self) -> None:
        """Hear nothing more."""
        for task in self._tasks:
            task.cancel()
        self._context.destroy(linger=0)
