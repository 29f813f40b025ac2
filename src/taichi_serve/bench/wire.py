"""What the process that measures and one that sends say to each other: msgpack over a pipe, in frames.

A frame is the length of what follows (4 bytes, big endian) and one message. Nothing is pickled. Times are
`time.perf_counter()` seconds, which on Linux is one clock for all processes of a host.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import msgspec

from taichi_serve.bench.score import Sample
from taichi_serve.bench.sending import First, Which
from taichi_serve.bench.sharing import turns
from taichi_serve.cluster.simulated.job import Call
from taichi_serve.slo import SLO

LENGTH = 4


class Request(msgspec.Struct, array_like=True, frozen=True):
    """A request and the turns that follow it, in a row: nested, long conversations would be too deep."""

    place: int
    calls: tuple[Call, ...]
    prompt: list[int]

    @classmethod
    def of(cls, first: First) -> Request:
        """For the pipe."""
        return cls(
            first.place, tuple(replace(call, then=None) for _, call in turns(first.call)), first.prompt
        )

    def first(self) -> First:
        """As it was."""
        *before, call = self.calls
        for each in reversed(before):
            call = replace(each, then=call)
        return First(self.place, call, self.prompt)


class Load(msgspec.Struct, tag=True, frozen=True):
    """To a sender: its share of a plan, and where it goes."""

    part: int  # its number
    url: str
    authorization: str | None  # a header; on a command line everybody could read it
    model: str
    limit: int  # tokens of prompt and output together
    seed: int
    salt: int
    block_size: int
    slo: SLO  # of requests that have none
    requests: list[Request]


class Go(msgspec.Struct, tag=True, frozen=True):
    """To a sender: the times of its requests count from here."""

    began: float


class Ready(msgspec.Struct, tag=True, frozen=True):
    """A sender has its share, and waits."""


class Begun(msgspec.Struct, array_like=True, frozen=True):
    """A request was due and was sent."""

    which: Which
    due: float
    at: float


class Ended(msgspec.Struct, array_like=True, frozen=True):
    """A request is over. The number in its sample means nothing yet."""

    which: Which
    sample: Sample


class Report(msgspec.Struct, tag=True, frozen=True):
    """What became of a sender's requests since it last said so. All that were due before `mark` were sent."""

    mark: float
    begun: list[Begun]
    lost: list[Which]  # under way, and cannot be good any more
    ended: list[Ended]


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The server cannot be measured, and why."""

    words: str


class Over(msgspec.Struct, tag=True, frozen=True):
    """A sender's last word, and which share of a core it used while it sent."""

    busy: float


Said = Ready | Report | Failed | Over  # by a sender
Told = Load | Go  # to a sender; that there is enough is told by closing the pipe
_SAID: msgspec.msgpack.Decoder[Said] = msgspec.msgpack.Decoder(Said)
_TOLD: msgspec.msgpack.Decoder[Told] = msgspec.msgpack.Decoder(Told)


def frame(message: Said | Told) -> bytes:
    """For the pipe."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH, "big") + body


async def said(reader: asyncio.StreamReader) -> Said:
    """What a sender says next; IncompleteReadError where the pipe ends, msgspec.ValidationError for anything
    else."""
    return _SAID.decode(await _body(reader))


async def told(reader: asyncio.StreamReader) -> Told:
    """What a sender is told next; raises the same."""
    return _TOLD.decode(await _body(reader))


async def _body(reader: asyncio.StreamReader) -> bytes:
    length = int.from_bytes(await reader.readexactly(LENGTH), "big")
    return await reader.readexactly(length)
