"""One incarnation of an instance as the server sees it: its client, its copiers, the legs that run on it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from taichi_serve.cluster.vllm.server.copiers import Copiers
from taichi_serve.cluster.vllm.server.engine_client import InstanceClient
from taichi_serve.cluster.vllm.server.offset import Offset
from taichi_serve.cluster.vllm.server.process import Process
from taichi_serve.cluster.vllm.wire import Call, Drop, More, MovedIn, News
from taichi_serve.messages import SetChunk
from taichi_serve.sliders import Kind

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

    from taichi_serve.cluster.vllm.server.blocks import Hasher
    from taichi_serve.cluster.vllm.server.journey import Journey

LOOK_SECONDS = 30.0  # that one may take to say whose memory it reads


@dataclass(slots=True, eq=False)
class Engine:
    """A running instance. Legs are called by their engine-side ids."""

    index: int
    name: str
    process: Process
    client: InstanceClient
    copiers: Copiers
    kind: Kind
    chunk: int
    legs: dict[str, Journey] = field(default_factory=dict)  # whose outputs these are
    residents: dict[str, str] = field(default_factory=dict)  # of these, decoding: leg -> request
    alive: bool = True
    heard_at: float = field(default_factory=time.monotonic)
    offset: Offset = field(default_factory=Offset)  # of its host's clock
    kv_tokens: int = 0  # see holds
    held_at: float = 0.0
    running: int = 0
    waiting: int = 0
    made_at: float = 0.0  # when its last step was done
    moved_in: dict[str, MovedIn] = field(default_factory=dict)  # of its last step
    news: dict[str, News] = field(default_factory=dict)  # of its last step
    cached_blocks: int = 0  # of its prefix cache, by what it told
    host_blocks: int | None = None  # of those it offloaded to its host; None where it does not
    recomputed_late: int = 0  # legs whose KV did not come in time

    @property
    def engine_id(self) -> str:
        """Of this incarnation alone."""
        return self.process.engine_id

    @property
    def cut(self) -> bool:
        """Whether a connection to it was lost and made anew; what was on its way is lost then."""
        return self.process.line.contacts.again

    @property
    def kv_capacity(self) -> int:
        """Tokens its KV cache holds."""
        return self.client.kv_capacity

    @property
    def max_model_len(self) -> int:
        """Tokens that a request may have."""
        return int(self.client.vllm_config.model_config.max_model_len)

    def holds(self, kv_tokens: int, at: float) -> None:
        """Tokens of KV that were held at `at` of the engine's own clock. A step and the answer to a call may
        be heard in another order than they were said in: what is older than what is known says nothing."""
        if at >= self.held_at:
            self.kv_tokens, self.held_at = kv_tokens, at

    def set_chunk(self, command: SetChunk) -> None:
        """Prompt tokens per step from now on."""
        self.kind, self.chunk = command.kind, command.chunk
        self.client.tell(Call.CHUNK, command.chunk)

    def follow(self, hasher: Hasher | None) -> None:
        """Have it tell what is in its prefix cache, from the beginning; nobody asks where hashes differ."""
        if hasher is not None:
            self.client.tell(Call.CACHED, hasher.first)

    # ---------------------------------------------------------------------------------------- its legs

    def send(self, request: EngineCoreRequest) -> None:
        """Send an engine request. A dead engine takes it silently: its loss is about to be told."""
        if not self.client.dead:
            self.client.add(request)

    def adopt(self, leg: str, journey: Journey) -> None:
        """The outputs of this leg are the journey's from now on."""
        if not self.legs:
            self.heard_at = time.monotonic()
        self.legs[leg] = journey

    def settle(self, leg: str, request: str) -> None:
        """The leg's first token is out: it is a resident decode now."""
        self.residents[leg] = request

    def forget(self, leg: str) -> None:
        """The leg is over."""
        self.legs.pop(leg, None)
        self.residents.pop(leg, None)

    def end(self, leg: str) -> None:
        """End a leg from outside."""
        if self.legs.pop(leg, None) is not None:
            self.residents.pop(leg, None)
            self.client.abort([leg])

    def put_off(self, leg: str, by: float) -> None:
        """A prompt is best effort, and takes this place where it waits."""
        self.client.tell(Call.PUT_OFF, leg, by)

    def leave(self, leg: str) -> None:
        """Have a leg end after the token it is on."""
        self.client.tell(Call.LEAVE, [leg])

    # ------------------------------------------------------------------------------------ their KV

    def release(self, leg: str | None, reader: str | None) -> None:
        """Let go of what is held of a leg that left, and of what is pinned for a reader."""
        if self.alive and not self.client.dead:
            legs = [] if leg is None else [leg]
            readers = [] if reader is None else [reader]
            call = self.client.call_utility_async(Call.RELEASE, legs, readers)
            asyncio.ensure_future(call).add_done_callback(self._released)

    def _released(self, answer: asyncio.Future[tuple[int, float]]) -> None:
        if not answer.cancelled() and answer.exception() is None:
            self.holds(*answer.result())

    def pin(self, leg: str, reader: str) -> asyncio.Future[list[int] | None]:
        """The blocks of a leg that are full by now, pinned for a reader; None where it cannot be read so."""
        return self._ask(Call.PIN, leg, reader)

    def find(self, reader: str, hashes: list[bytes]) -> asyncio.Future[list[int]]:
        """The blocks with these hashes that its prefix cache holds, from the first one on, pinned."""
        return self._ask(Call.PREFIX, reader, hashes)

    def fetched(self, leg: str, blocks: int) -> None:
        """The first blocks of a leg are here, and no more will come."""
        self.client.tell(Call.FETCHED, leg, blocks)

    def waive(self, leg: str) -> asyncio.Future[bool]:
        """Have a leg computed without a fetch; False where blocks were given to it for one."""
        return self._ask(Call.WAIVE, leg)

    def uncopy(self, leg: str) -> None:
        """Nothing is to be copied for a leg."""
        self.copiers.send(Drop(leg))

    def drop(self, leg: str, copied: bool) -> asyncio.Future[bool]:
        """End a leg; the answer comes when nothing is read or written for it any more."""
        if copied:
            self.copiers.send(Drop(leg))
        return self._ask(Call.DROP, leg)

    def arrive(self, leg: str, tokens: list[int]) -> asyncio.Future[bool]:
        """A leg that was copied ahead has left its source; False where it is not here, or has no blocks."""
        return self._ask(Call.ARRIVE, leg, tokens)

    def copy(self, leg: str, source: str, blocks: list[int], note: str, whole: bool = False) -> None:
        """Have blocks of the engine `source` copied for a leg here."""
        self.copiers.send(More(leg, source, blocks, note, whole))

    async def look_around(self) -> None:
        """Ask whose memory it reads itself, where that is not to be seen here. Never raises, and waits no
        longer than LOOK_SECONDS: nobody watches one that is not let in yet, and others wait behind it."""
        if self.process.direct is not None and self.alive:
            with contextlib.suppress(Exception):  # it dies just now, or hangs: that is noticed elsewhere
                async with asyncio.timeout(LOOK_SECONDS):
                    self.process.direct = set(await self._ask(Call.DIRECT))

    async def answers(self) -> None:
        """Come back when its core and every worker have answered. Raises what the core's client raises."""
        await asyncio.gather(self._ask(Call.HERE), self.copiers.ping())

    def _ask(self, call: Call, *args: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self.client.call_utility_async(call, *args))
