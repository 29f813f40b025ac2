"""The scheduler's side of several front ends: to the rest of the server they are one (system.Front).

A request belongs to the front end that brought it. What engines make for it goes on to that one, in the
order in which it came here: there is one place that joins the legs of a request, and it is the cluster. When
a front end dies its requests are cancelled, as if all its clients had left.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from zmq import ZMQError

from taichi_serve.classes import Terms
from taichi_serve.frontend.everywhere import everywhere
from taichi_serve.frontend.names import Names
from taichi_serve.frontend.several.line import Line
from taichi_serve.frontend.several.owners import Owners
from taichi_serve.frontend.several.shared import Shared
from taichi_serve.frontend.several.words import (
    CACHE,
    CALLS,
    Abandoned,
    Answer,
    Declined,
    Failed,
    Instance,
    Note,
    Outputs,
    Ping,
    Pong,
    Question,
    Serving,
    Standing,
    Submitted,
    ToFrontEnd,
    Welcome,
)
from taichi_serve.messages import (
    Command,
    Decline,
    Event,
    Finished,
    Hopeless,
    Joined,
    Lost,
    Promised,
    Removed,
    Silent,
)

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.server.cluster import VllmCluster
    from taichi_serve.cluster.vllm.server.fleet import Fleet
    from taichi_serve.frontend.attendance import Attendance
    from taichi_serve.frontend.several.keeping import FrontEndKeeper
    from taichi_serve.frontend.trouble import Trouble

NEWS = (Lost, Joined, Removed, Silent, Hopeless, Promised)  # after which front ends are told how things stand


class FrontEnds:
    """So many of them. `lines` has one for each, None while it has no process."""

    cluster: VllmCluster
    attendance: Attendance
    trouble: Trouble
    keeper: FrontEndKeeper

    def __init__(self, count: int, directory: Path) -> None:
        """Their sockets and what they share are in this directory, which only its user can read."""
        self.count = count
        self.directory = directory
        self.closing = False
        self.owners = Owners()
        self.names = Names()
        self.shared = Shared.make(self.shared_file, count)
        self.lines: list[Line | None] = [None] * count
        self.heard_at = [0.0] * count  # by `clock`
        self.clock: Callable[[], float] = time.monotonic
        self.serving: Callable[[int], None] = lambda index: None
        self.drained: Callable[[], float] = lambda: 0.0  # as System.drained
        self._slo: Callable[[], Any] = lambda: None
        self._told: Standing | None = None
        self._listening: dict[int, asyncio.Task[None]] = {}
        self._asked: set[asyncio.Task[None]] = set()
        self._births = itertools.count()
        self._incarnation = [0] * count  # of each, among all
        self._turn = 0  # whose the statistics of an instance are

    @property
    def inside(self) -> Path:
        """The socket on which front ends are answered (inside.py)."""
        return self.directory / "inside.http"

    @property
    def shared_file(self) -> Path:
        """See shared.py."""
        return self.directory / "front-ends.shared"

    def open(self, instances: Fleet, attendance: Attendance, trouble: Trouble) -> FrontEnds:
        """These instances are up."""
        self.cluster, self.attendance, self.trouble = instances.cluster, attendance, trouble
        self.clock = lambda: instances.patience.now
        return self

    def promise(self, slo: Callable[[], Any]) -> None:
        """Where to look up what the server promises."""
        self._slo = slo

    # ----------------------------------------------------------------------------- what the system asks

    @property
    def unfinished(self) -> bool:
        """Whether a request is open."""
        return bool(self.owners)

    def behind(self, request_id: str) -> list[list[str]]:
        """See Names.behind."""
        return self.names.behind(request_id)

    def added(self, index: int) -> None:
        """An instance takes part: front ends are told before its first output comes."""
        self.tell()

    def removed(self, index: int) -> None:
        """An instance left."""
        self.tell()

    def processes(self) -> list[dict[str, Any]]:
        """How they stand."""
        return [
            {
                **self.keeper.view(index),
                "requests": self.owners.count(index),
                "connections": self.shared.connections(index),
            }
            for index in range(self.count)
        ]

    def fail(self, request_id: str, why: str) -> None:
        """End a request with a 500 that says why."""
        self._to(self.owners.of(request_id), Failed(request_id, why))

    def decline(self, decline: Decline) -> None:
        """Turn a request away."""
        self._to(self.owners.of(decline.request), Declined(decline.request, decline.retry_after))

    def deliver(self, outputs: EngineCoreOutputs) -> None:
        """Outputs of one step of an instance: each to whose request it is; its statistics to one of them."""
        parts = self.owners.split(outputs.outputs)
        stats = outputs.scheduler_stats
        if stats is not None and (reader := self._reader(parts)) is not None:
            parts.setdefault(reader, [])
        for owner, mine in parts.items():
            part = EngineCoreOutputs(
                engine_index=outputs.engine_index, outputs=mine, timestamp=outputs.timestamp
            )
            part.scheduler_stats, stats = stats, None
            try:
                self._to(owner, Outputs(), part)
            except Exception as wrong:  # noqa: BLE001  vLLM's encoder raises what it likes; engines go on
                self.trouble.note("front end", wrong)
                for output in mine:
                    self.fail(output.request_id, "what was made for the request could not be sent")
                    self.cluster.abandon(output.request_id, cancelled=True)

    def _reader(self, parts: dict[int, Any]) -> int | None:
        """Who gets statistics that come with these: who gets a message anyway, or one after the other."""
        if parts:
            return next(iter(parts))
        there = [index for index, line in enumerate(self.lines) if line is not None]
        self._turn += 1
        return there[self._turn % len(there)] if there else None

    # -------------------------------------------------------------------------------- how things stand

    def standing(self) -> Standing:
        """How the instances stand now."""
        now = time.monotonic()
        silent = self.attendance.silent
        instances = [Instance(e.index, e.alive, e in silent) for e in self.cluster.engines]
        seconds = self.attendance.retry_after()
        return Standing(tuple(instances), None if seconds is None else round(now + seconds), self._slo())

    def observe(self, event: Event, commands: Sequence[Command]) -> None:
        """A fact, once the scheduler has decided: told like the page's observers (record.py)."""
        if type(event) is Finished:  # its last output has been delivered
            self.owners.over(event.request)
        elif isinstance(event, NEWS):
            self.tell()

    def tell(self) -> None:
        """Tell everybody how things stand, where that has changed."""
        standing = self.standing()
        if standing != self._told:
            self._told = standing
            for index in range(self.count):
                self._to(index, standing)

    def ping(self) -> None:
        """Ask everybody for a word."""
        word = Ping(self.drained())
        for index in range(self.count):
            self._to(index, word)

    # ---------------------------------------------------------------------------- one comes, one goes

    def join(self, index: int, address: str) -> None:
        """Begin to listen to the next process of this front end, at a new address. It is welcome at once."""
        line = self.lines[index] = Line(address, EngineCoreRequest, bind=True)
        self.heard_at[index] = self.clock()
        self._incarnation[index] = next(self._births)
        config, hasher = self.cluster.engines[0].client.vllm_config, self.cluster.hasher
        welcome = Welcome(
            {name: getattr(config.cache_config, name, None) for name in CACHE},
            config.model_config.max_model_len,
            None if hasher is None else hasher.first,
            self.standing(),
        )
        line.send(welcome)
        self._listening[index] = asyncio.create_task(self._listen(index, line), name=f"front end {index}")

    def lose(self, index: int) -> int:
        """Its process is gone: its requests are cancelled; how many there were."""
        if (task := self._listening.pop(index, None)) is not None:
            task.cancel()
        if (line := self.lines[index]) is not None:
            line.close()
        self.lines[index] = None
        self.shared.forget(index)
        gone = self.owners.lose(index)
        for request in gone:
            self.cluster.abandon(request, cancelled=True)
        return len(gone)

    async def _listen(self, index: int, line: Line) -> None:
        while True:
            word: Any = None
            follows: Any = None
            try:
                word, follows = await line.hear()
                self.heard_at[index] = self.clock()
                self._take(index, word, follows)
            except ZMQError:  # the line is closed
                return
            except Exception as wrong:  # noqa: BLE001  one request, and not all of its front end
                self.trouble.note("front end", wrong)
                if isinstance(word, Submitted):
                    self.fail(follows.request_id, "the request could not be taken in")
                    self.owners.over(follows.request_id)

    def _take(self, index: int, word: Any, follows: Any) -> None:
        match word:
            case Submitted():
                self.owners.take(follows.request_id, index)
                self.names.belongs((self._incarnation[index], word.asked), word.name, follows.request_id)
                self.cluster.accept(follows, word.blocks, Terms(word.slo, word.slo_class))
            case Abandoned(request=request, cancelled=cancelled):
                if self.owners.of(request) == index:
                    self.cluster.abandon(request, cancelled)
            case Question():
                task = asyncio.create_task(self._answer(index, word))
                self._asked.add(task)
                task.add_done_callback(self._asked.discard)
            case Serving():
                self.serving(index)
            case Note(what=what, why=why):
                self.trouble.note(what, why)
            case Pong():
                pass

    async def _answer(self, index: int, question: Question) -> None:
        try:
            if question.method not in CALLS:
                raise ValueError(f"{question.method} is no call of a front end")
            args = question.args
            if question.method == "add_lora_async":
                args = [msgspec.convert(args[0], LoRARequest)]
            found = await everywhere(self.cluster, question.method, *args)
            self._to(index, Answer(question.number, found))
        except Exception as wrong:  # noqa: BLE001  whoever asked is told
            self._to(index, Answer(question.number, wrong=f"{type(wrong).__name__}: {wrong}"))

    def _to(self, index: int | None, word: ToFrontEnd, payload: Any = None) -> None:
        if index is not None and (line := self.lines[index]) is not None:
            line.send(word, payload)

    def close(self) -> None:
        """Hear nobody any more."""
        for index in range(self.count):
            self.lose(index)
