"""One of several processes that send a plan: `python -m taichi_serve.bench.sender`.

It speaks wire.py on its standard input and output. It ends with its input: nothing is left of it when its
owner ends, however.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Iterable
from math import inf

import httpx

from taichi_serve.bench.client import Answer
from taichi_serve.bench.endpoint import Endpoint, EndpointError, client_of
from taichi_serve.bench.lateness import Core
from taichi_serve.bench.prompts import Prompts
from taichi_serve.bench.score import Live, Sample
from taichi_serve.bench.sending import Sending, Which
from taichi_serve.bench.wire import Begun, Ended, Failed, Go, Load, Over, Ready, Report, Said, frame, told
from taichi_serve.slo import SLO

TELL = 0.1  # seconds between reports
MOST = 1 << 26  # bytes of a frame that are read at once


class Share:
    """What became of this sender's requests, until it is reported."""

    def __init__(self, seed: int, slo: SLO) -> None:
        self._seed, self._slo = seed, slo
        self._due: dict[Which, float] = {}  # of those that are not sent yet
        self._live: dict[Which, Live] = {}
        self._lost: set[Which] = set()
        self._begun: list[Begun] = []
        self._ended: list[Ended] = []

    def waits(self, which: Which, due: float) -> None:
        """It will be sent then."""
        self._due[which] = due

    def begun(self, which: Which, live: Live, now: float) -> None:
        """It is sent."""
        self._begun.append(Begun(which, self._due.pop(which), now))
        self._live[which] = live

    def ended(self, which: Which, live: Live, answer: Answer) -> None:
        """Its answer is over."""
        del self._live[which]
        self._lost.discard(which)
        self._ended.append(Ended(which, Sample.of((self._seed, 0), live, answer, self._slo)))

    def report(self, now: float, over: bool = False) -> Report:
        """All that is new. What is yet to be sent was due at `mark` or later: a next turn comes after now."""
        late = {which for which, live in self._live.items() if live.lost(now, self._slo)} - self._lost
        self._lost |= late
        mark = inf if over else min(now, min(self._due.values(), default=inf))
        made = Report(mark, self._begun, sorted(late), self._ended)
        self._begun, self._ended = [], []
        return made


class Sender:
    """The process, from its first word to its last."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def run(self) -> None:
        """Send what it is told to. IncompleteReadError or OSError: whoever told it is gone."""
        load = await told(self._reader)
        assert isinstance(load, Load)
        firsts = [request.first() for request in load.requests]
        async with client_of(load.url, load.authorization) as client:
            prompts, share = Prompts(load.salt, load.block_size, load.part), Share(load.seed, load.slo)
            sending = Sending(Endpoint(client, load.model, load.limit, ""), prompts, share)
            # What is slow once, connecting and all that is imported for it, is not to make requests late.
            with contextlib.suppress(httpx.HTTPError):
                await client.get("/version")
            await self._say(Ready())
            go = await told(self._reader)
            assert isinstance(go, Go)
            core = Core()
            tasks = sending.start(firsts, go.began)
            await asyncio.sleep(0)  # every one says when it is due
            try:
                await self._follow(tasks, share)
            except EndpointError as wrong:
                await self._say(Failed(str(wrong)))
            finally:
                busy = core.share()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            await self._say(Over(busy))

    async def _follow(self, tasks: Iterable[asyncio.Task[None]], share: Share) -> None:
        """Report until all is over, or there is enough."""
        every = asyncio.gather(*tasks)
        enough = asyncio.ensure_future(self._reader.read(1))
        try:
            while not (every.done() or enough.done()):
                await asyncio.wait((every, enough), timeout=TELL, return_when=asyncio.FIRST_COMPLETED)
                await self._say(share.report(time.perf_counter(), every.done()))
            if every.done():
                every.result()
        finally:
            every.cancel()
            enough.cancel()
            await asyncio.gather(every, enough, return_exceptions=True)

    async def _say(self, message: Said) -> None:
        self._writer.write(frame(message))
        await self._writer.drain()


async def main() -> None:
    """The process."""
    loop = asyncio.get_running_loop()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not get into a frame
    reader = asyncio.StreamReader(MOST)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), out
    )
    transport.set_write_buffer_limits(high=0)  # what was said is with whoever reads before this process ends
    writer = asyncio.StreamWriter(transport, protocol, None, loop)
    try:
        await Sender(reader, writer).run()
    except (asyncio.IncompleteReadError, BrokenPipeError, ConnectionResetError):
        return  # nobody is left to tell
    finally:
        transport.close()


if __name__ == "__main__":
    asyncio.run(main())
