"""A line between the scheduler's process and one front end: words (words.py), in order, both ways.

It is a pair of ZeroMQ sockets over a file in the server's directory. Sending never waits, and nothing is
dropped: who reads too slowly is noticed by what it does not answer (hub.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from taichi_serve.frontend.several.words import Word

UNLIMITED = 0


class Line:
    """One end. `follows` is the type of what follows some of the words that come."""

    def __init__(self, address: str, follows: type[Any], bind: bool = False) -> None:
        """The end that binds is the server's. Raises ZMQError where the address is taken."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        for option in (zmq.SNDHWM, zmq.RCVHWM):
            self._socket.setsockopt(option, UNLIMITED)
        self._socket.linger = 0
        (self._socket.bind if bind else self._socket.connect)(address)
        self._encoder = MsgpackEncoder()
        self._words = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Word)
        self._payloads = MsgpackDecoder(follows)
        self._closed = False

    def send(self, word: Word, payload: Any = None) -> None:
        """Never waits. Raises TypeError for what cannot be said."""
        frames: list[Any] = [self._words.encode(word)]
        if payload is not None:
            frames += self._encoder.encode(payload)
        if not self._closed:
            self._socket.send_multipart(frames)

    async def hear(self) -> tuple[Word, Any]:
        """The next word, and what follows it, if anything does."""
        frames: Sequence[Any] = await self._socket.recv_multipart(copy=False)
        word: Word = self._decoder.decode(frames[0])
        return word, self._payloads.decode(frames[1:]) if len(frames) > 1 else None

    def close(self) -> None:
        """Say nothing more, and hear nothing more."""
        self._closed = True
        self._context.destroy(linger=0)
