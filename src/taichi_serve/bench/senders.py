"""The load of one plan from several processes: a share for each, and what they report put together.

One process can read some 12,000 tokens a second. Beyond that it sends and reads late, and what it measures is
itself. The requests go round robin over the senders in the order in which they are due; conversations stay
with the sender that began them. All have one clock and one beginning. Numbers are given here, in the order in
which requests were due, so that they are those of one sender.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable
from dataclasses import replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import msgspec

from taichi_serve.bench.endpoint import Endpoint, EndpointError
from taichi_serve.bench.prompts import Prompts
from taichi_serve.bench.score import Key, Live, Sample, Score
from taichi_serve.bench.sending import First, Which
from taichi_serve.bench.sharing import turns
from taichi_serve.bench.wire import Failed, Go, Load, Over, Ready, Report, Request, Said, Told, frame, said

if TYPE_CHECKING:
    from taichi_serve.bench.openloop import Plan

MODULE = "taichi_serve.bench.sender"
MOST, CORES, LEAST_CORES = 16, 16, 16
LOOK = 0.05  # seconds between looks at what was reported
AHEAD = 0.1  # seconds from telling all senders when it begins to that
START_SECONDS, SILENT_SECONDS, END_SECONDS = 60.0, 30.0, 5.0


class SenderError(RuntimeError):
    """A process that sends has ended, or says nothing; the message names it and says how."""


def chosen(asked: int, cores: int | None = None) -> int:
    """How many processes are to send: as many as were `asked` for, or, for 0, one for 16 cores, at least two
    from 16 cores on and one below. Raises ValueError."""
    if not 0 <= asked <= MOST:
        raise ValueError(f"--senders must be between 0 and {MOST}, not {asked}")
    cores = cores or len(os.sched_getaffinity(0))
    if asked or cores < LEAST_CORES:
        return asked or 1
    return min(MOST, max(2, cores // CORES))


class Merged:
    """What several senders report, told to one score as if one had sent everything."""

    def __init__(self, plan: Plan, score: Score, senders: int) -> None:
        self._plan, self._score = plan, score
        self._calls = [[call for _, call in turns(call)] for call in plan.calls]
        self._marks = [float("-inf")] * senders
        self._begun: list[tuple[float, Which, float]] = []  # due, which, sent; a heap
        self._sent = 0
        self._keys: dict[Which, Key | None] = {}  # of those that have a number; None: of the warm-up
        self._lost: set[Which] = set()
        self._ended: dict[Which, Sample] = {}  # without a number yet

    def take(self, sender: int, report: Report) -> None:
        """One more report."""
        self._marks[sender] = report.mark
        for one in report.begun:
            heappush(self._begun, (one.due, one.which, one.at))
        for ended in report.ended:
            if ended.which in self._keys:
                self._end(ended.which, ended.sample)
            else:
                self._ended[ended.which] = ended.sample
        self._lost.update(report.lost)
        while self._begun and self._begun[0][0] < min(self._marks):
            due, which, at = heappop(self._begun)
            self._begin(which, due, at)
        self._score.lose(filter(None, map(self._keys.get, self._lost)))
        self._lost.difference_update(self._keys)

    def _begin(self, which: Which, due: float, at: float) -> None:
        number = self._sent
        self._sent += 1
        place, turn = which
        key = self._keys[which] = (self._plan.seed, number) if number >= self._plan.warm_up else None
        if key is not None:
            call = self._calls[place][turn]
            live = Live(due, call.prompt_tokens, call.output_tokens, slo=call.slo, slo_class=call.slo_class)
            self._score.begin(key, live, at)
        if (sample := self._ended.pop(which, None)) is not None:
            self._end(which, sample)

    def _end(self, which: Which, sample: Sample) -> None:
        self._lost.discard(which)
        if (key := self._keys.pop(which)) is not None:
            self._score.add(key, replace(sample, number=key[1]))


class Process:
    """One sender, as whoever started it sees it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self._name, self._process = name, process
        assert process.stderr is not None
        self._errors = asyncio.create_task(process.stderr.read())

    @classmethod
    async def start(cls, number: int) -> Process:
        """It waits for its share."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", MODULE),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            process_group=0,  # Ctrl-C in a terminal is its owner's business
        )
        return cls(f"sender {number} (process {process.pid})", process)

    async def tell(self, message: Told) -> None:
        """Send it a word; whether it has ended is found out by `hear`. Raises SenderError where it does not
        listen."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(frame(message))
            async with asyncio.timeout(START_SECONDS):
                await self._process.stdin.drain()
        except TimeoutError:
            raise SenderError(f"{self._name} of the load has taken nothing for {START_SECONDS:g} s") from None
        except (BrokenPipeError, ConnectionResetError):
            return

    async def hear(self, seconds: float) -> Said:
        """Its next word. Raises SenderError where none comes, and EndpointError where the server is to
        blame."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                word = await said(self._process.stdout)
        except TimeoutError:
            raise SenderError(f"{self._name} of the load has said nothing for {seconds:g} s") from None
        except asyncio.IncompleteReadError:
            raise SenderError(f"{self._name} of the load {await self._end()}") from None
        except msgspec.DecodeError as wrong:
            raise SenderError(f"{self._name} of the load said what is no word of it: {wrong}") from None
        if isinstance(word, Failed):
            raise EndpointError(word.words)
        return word

    async def _end(self) -> str:
        """How it ended, with the last line that it wrote."""
        status = await self._process.wait()
        how = f"ended with exit code {status}" if status >= 0 else f"was ended by signal {-status}"
        lines = (await asyncio.shield(self._errors)).decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        return f"{how}: {last}"

    def enough(self) -> None:
        """Tell it to end; it says one more word."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    async def end(self, patience: float) -> None:
        """Nothing is left of it; it has so many seconds to end by itself."""
        self.enough()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._process.wait()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        assert self._process.stdout is not None
        await self._process.stdout.read()  # a pipe that is not read to its end stays open
        await self._errors
        await self._process.wait()


class Senders:
    """One plan, sent by several."""

    def __init__(self, endpoint: Endpoint, plan: Plan, score: Score, salt: int, count: int) -> None:
        self._endpoint, self._plan, self._score, self._salt = endpoint, plan, score, salt
        self._merged: Merged | None = Merged(plan, score, count)
        self._processes: list[Process] = []
        self._count = count

    async def run(self, over: Callable[[], bool], tell: Callable[[], None]) -> None:
        """Until all requests have ended, or `over` says so; `tell` is called when there is news."""
        listening: list[asyncio.Task[float]] = []
        try:
            for number in range(self._count):
                self._processes.append(await Process.start(number))
            await self._share()
            listening = [asyncio.create_task(self._listen(number)) for number in range(self._count)]
            pending = set(listening)
            while pending and not over():
                done, pending = await asyncio.wait(pending, timeout=LOOK, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                tell()
            await self._last_words(listening)
        finally:
            for task in listening:
                task.cancel()
            await asyncio.gather(*listening, return_exceptions=True)
            patience = END_SECONDS if self._merged is None else 0.0  # after an error nobody has any
            await asyncio.gather(*(process.end(patience) for process in self._processes))

    async def _last_words(self, listening: list[asyncio.Task[float]]) -> None:
        """What each used of its core. What becomes of its requests now was not known when it was decided."""
        self._merged = None
        for process in self._processes:
            process.enough()
        await asyncio.wait(listening, timeout=END_SECONDS)
        told = [task.result() for task in listening if task.done() and task.exception() is None]
        self._score.used(tuple(told))

    async def _share(self) -> None:
        """Tell everybody what to send, and then all at once that it begins."""
        for part, requests in enumerate(self.parts()):
            await self._processes[part].tell(self._load(part, requests))
        for process in self._processes:
            word = await process.hear(START_SECONDS)
            assert isinstance(word, Ready)
        began = time.perf_counter() + AHEAD
        for process in self._processes:
            await process.tell(Go(began))

    def parts(self) -> list[list[Request]]:
        """The requests of each. All prompts are made here, as one sender would make them."""
        prompts = Prompts(self._salt, self._plan.block_size)
        firsts = [First(place, call, prompts.first(call)) for place, call in enumerate(self._plan.calls)]
        firsts.sort(key=lambda first: first.call.at)
        return [[Request.of(first) for first in firsts[part :: self._count]] for part in range(self._count)]

    def _load(self, part: int, requests: list[Request]) -> Load:
        client, plan = self._endpoint.client, self._plan
        where = str(client.base_url), client.headers.get("Authorization")
        model = self._endpoint.model, self._endpoint.limit
        return Load(part, *where, *model, plan.seed, self._salt, plan.block_size, self._score.slo, requests)

    async def _listen(self, number: int) -> float:
        """Take what one of them reports, to its end; the share of a core that it used."""
        while True:
            word = await self._processes[number].hear(SILENT_SECONDS)
            if isinstance(word, Over):
                return word.busy
            if isinstance(word, Report) and self._merged is not None:
                self._merged.take(number, word)
