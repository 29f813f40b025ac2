"""A pretended engine core: it hears messages late, computes in steps of any kind, and keeps an exact account
of the KV that it holds for others.

Tokens are numbers: the k-th output token of every request is 1000 + k, so a stream that lost, doubled or
mixed up a token is seen at once. KV is an account, too: a source holds blocks for a leg that left (`held`)
and for a reader (`pins`); what is read after the source let go may belong to others (pretended_copiers.py).
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pretended_copiers import PretendedCopiers
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import SchedulerStats

from taichi_serve.cluster.vllm.wire import KEY, LEFT, UNREAD, Record, marks

if TYPE_CHECKING:
    from world import World

BLOCK = 4  # tokens
FIRST = 1000  # the first output token of every request


@dataclass(slots=True, eq=False)
class Leg:
    """An engine request."""

    id: str
    prompt: list[int]
    left: int  # tokens that it may still make
    hand_over: bool
    reader: str | None
    ahead: bool
    kv: dict[str, Any] | None
    computed: int = 0
    made: list[int] = field(default_factory=list)
    reading: bool = False  # its KV is on its way, by itself
    arrived: bool = False  # it was copied ahead, and its source has left
    awaited: bool = False  # the step that runs waits for its tail
    fetch: int = 0  # blocks of its prompt that come from elsewhere; 0 when nothing is to come any more
    given: bool = False  # it has the blocks for that
    running: bool = False

    @classmethod
    def of(cls, request: EngineCoreRequest) -> Leg:
        params = request.sampling_params
        assert params is not None and params.max_tokens is not None
        ours, extra = marks(params.extra_args), params.extra_args or {}
        return cls(
            request.request_id,
            list(request.prompt_token_ids or ()),
            params.max_tokens,
            ours.hand_over,
            ours.reader,
            bool(ours.ahead),
            extra.get("kv_transfer_params"),
            fetch=ours.fetch,
        )

    def next_token(self) -> int:
        """What a model would make of it."""
        return FIRST + sum(token >= FIRST for token in self.prompt) + len(self.made)


class Core:
    """The client's port of an engine core, and the core."""

    dead = False
    kv_capacity = 600
    vllm_config: Any = SimpleNamespace(
        use_v2_model_runner=False,
        cache_config=SimpleNamespace(
            enable_prefix_caching=True, block_size=BLOCK, prefix_caching_hash_algo="sha256"
        ),
        model_config=SimpleNamespace(max_model_len=4000),
    )

    def __init__(self, world: World, engine_id: str, chunk: int) -> None:
        self.world = world
        self.engine_id = engine_id
        self.chunk = chunk
        self.inbox: deque[tuple[str, tuple[Any, ...], asyncio.Future[Any] | None]] = deque()
        self.outbox: deque[EngineCoreOutputs] = deque()
        self.answers: deque[tuple[asyncio.Future[Any], Any]] = deque()
        self.legs: dict[str, Leg] = {}
        self.held: dict[str, int] = {}  # legs that left: blocks
        self.pins: dict[str, set[int]] = {}  # by reader
        self.pinned: dict[str, str] = {}  # reader -> the leg whose blocks these are
        self.leaving: dict[str, None] = {}
        self.drops: list[tuple[str, asyncio.Future[Any]]] = []
        self.copiers = PretendedCopiers(self)
        self.silent = False
        self.steps = 0

    # ------------------------------------------------------------------------- what the server may call

    def add(self, request: EngineCoreRequest) -> None:
        self._hear("add", Leg.of(request))

    def abort(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self._hear("abort", name)

    def tell(self, method: str, *args: Any) -> None:
        self._hear(method, *args)

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        if self.dead:
            raise RuntimeError("dead")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.inbox.append((method, args, future))
        return await future

    def _hear(self, what: str, *args: Any) -> None:
        if not self.dead:
            self.inbox.append((what, args, None))

    @property
    def busy(self) -> bool:
        """Whether something of it is on its way to anybody, or is computed."""
        mine = self.inbox, self.outbox, self.answers, self.legs, self.drops
        copying = self.copiers.orders, self.copiers.words, self.copiers.reading
        return not self.dead and any((*mine, *copying))

    def die(self) -> None:
        """Whoever waits for an answer learns that there is none."""
        self.dead = True
        for _, _, future in self.inbox:
            if future is not None and not future.done():
                future.set_exception(RuntimeError("dead"))
        for future in [future for _, future in self.drops] + [future for future, _ in self.answers]:
            if not future.done():
                future.set_exception(RuntimeError("dead"))

    # -------------------------------------------------------------------------------- what it does with it

    def hear(self, most: int) -> None:
        """Take in messages, in their order; answers go out later."""
        for _ in range(min(most, len(self.inbox))):
            what, args, future = self.inbox.popleft()
            answer = self._take(what, args, future)
            if future is not None and what != "taichi_drop":
                self.answers.append((future, answer))

    def answer(self) -> None:
        """One answer reaches the server."""
        if self.answers:
            future, answer = self.answers.popleft()
            if not future.done():
                future.set_result(answer)

    def _take(self, what: str, args: tuple[Any, ...], future: asyncio.Future[Any] | None) -> Any:
        match what:
            case "taichi_drop":
                assert future is not None
                self._end(args[0])
                self.drops.append((args[0], future))
                return None
            case "taichi_leave":
                self.leaving |= {name: None for name in args[0] if name in self.legs}
                return None
            case "taichi_chunk":
                self.chunk = args[0]
                return None
        takes = {
            "add": self._add,
            "abort": self._end,
            "taichi_release": self._release,
            "taichi_pin": self._pin,
            "taichi_arrive": self._arrive,
            "taichi_prefix": self._prefix,
            "taichi_fetched": self._fetched,
            "taichi_waive": self._waive,
        }
        return takes[what](*args)  # type: ignore[operator]

    def _add(self, leg: Leg) -> None:
        if leg.id in self.legs or leg.id in self.held:
            raise AssertionError(f"duplicate id {leg.id} on {self.engine_id}")
        self.legs[leg.id] = leg

    def _end(self, name: str) -> None:
        self.legs.pop(name, None)
        self.leaving.pop(name, None)

    def _release(self, legs: list[str], readers: list[str]) -> tuple[int, float]:
        for name in legs:
            self.held.pop(name, None)
        for reader in readers:
            self.pins.pop(reader, None)
            self.pinned.pop(reader, None)
            for leg in self.legs.values():
                if leg.reader == reader:
                    leg.reader = None
        return 0, self.world.now

    def _full(self, leg: Leg) -> list[int]:
        final = leg.computed + len(leg.made) - 1 if leg.running else leg.computed
        return list(range(max(0, final) // BLOCK))

    def _pin(self, name: str, reader: str) -> list[int] | None:
        leg = self.legs.get(name)
        if leg is None or self.world.happens(0.03):
            return None
        blocks = self._full(leg)
        if blocks:
            self.pins.setdefault(reader, set()).update(blocks)
            self.pinned[reader] = name
        return blocks

    def _arrive(self, name: str, tokens: list[int]) -> bool:
        leg = self.legs.get(name)
        if leg is None or not leg.ahead or leg.arrived or self.world.happens(0.05):
            return False
        leg.prompt += tokens
        leg.left -= len(tokens)
        leg.arrived = True
        return True

    def _prefix(self, reader: str, hashes: list[bytes]) -> list[int]:
        """It holds as much as chance has it."""
        blocks = list(range(self.world.chance.randint(0, len(hashes))))
        if blocks:
            self.pins.setdefault(reader, set()).update(blocks)
            self.pinned[reader] = "prefix cache"
        return blocks

    def _fetched(self, name: str, blocks: int) -> None:
        leg = self.legs.get(name)
        if self.copiers.reads(name):
            self.world.wrong.append(f"{name} is computed while it is written into")
        if leg is not None and leg.fetch:
            if blocks > self.copiers.fetched.pop(name, 0) or blocks > leg.fetch:
                self.world.wrong.append(f"{name} was not read as far as {blocks} blocks")
            leg.computed, leg.fetch = max(leg.computed, blocks * BLOCK), 0
            self.world.seen["fetched" if blocks else "found nothing"] += 1

    def _waive(self, name: str) -> bool:
        leg = self.legs.get(name)
        if leg is not None and leg.fetch and leg.given:
            self.world.seen["not waived"] += 1
            return False
        if leg is not None:
            leg.fetch = 0
        self.world.seen["waived"] += 1
        return True

    def settle_drops(self) -> None:
        """Answer the drops of legs for which nothing is read any more."""
        for name, future in list(self.drops):
            if not self.copiers.reads(name) and self.world.happens(0.7):
                self.drops.remove((name, future))
                self.copiers.forget(name)
                self.answers.append((future, True))

    # -------------------------------------------------------------------------------------------- a step

    def step(self) -> None:
        """Compute something of somebody, and put it out."""
        self.hear(self.world.chance.choice([0, 1, 2, 100, 100]))
        self.settle_drops()
        self.steps += 1
        budget, prefilled, decodes = self.chunk or 8, 0, 0
        outputs: list[EngineCoreOutput] = []
        news: dict[str, Any] = {}
        for leg in list(self.legs.values()):
            if not leg.running:
                done = self._come_in(leg, outputs)
                if done is None:
                    continue
                taken = 0 if done else min(budget, len(leg.prompt) - leg.computed)
                budget, prefilled = budget - taken, prefilled + taken
                leg.computed += taken
                if leg.computed < len(leg.prompt):
                    if taken and leg.reader is not None and (blocks := self._pin_unasked(leg)):
                        news[leg.id] = (leg.reader, blocks)
                    continue
                leg.running = True
            elif self.world.happens(0.08):
                continue  # it misses this step
            decodes += 1
            outputs.append(self._make(leg))
        kv = sum(leg.computed + len(leg.made) for leg in self.legs.values())
        record = Record(self.world.now, 0.01, prefilled, decodes, kv, {}, news)
        stats = SchedulerStats(kv_connector_stats={KEY: record})
        self.outbox.append(EngineCoreOutputs(outputs=outputs, scheduler_stats=stats))

    def _pin_unasked(self, leg: Leg) -> list[int]:
        assert leg.reader is not None
        blocks = self._full(leg)
        if blocks:
            self.pins.setdefault(leg.reader, set()).update(blocks)
            self.pinned[leg.reader] = leg.id
        return blocks

    def _come_in(self, leg: Leg, outputs: list[EngineCoreOutput]) -> bool | None:
        """Whether a leg's KV is here (True), is to be computed (False), or is not here yet (None)."""
        if leg.ahead:
            return self._come_in_ahead(leg, outputs)
        if leg.kv is None:
            return None if self._waits_for_prefix(leg) else False
        if not leg.reading:
            leg.reading = self.world.happens(0.5)
            if leg.reading:
                self.copiers.pull(leg.id, leg.kv)
            return None
        result = self.copiers.pulled(leg.id)
        if result is None:
            return None
        if not result and self.world.happens(0.7):
            self._unread(leg, outputs)
            return None
        leg.kv = None
        if result:
            leg.computed = len(leg.prompt)
        return result  # vLLM computes again in place what a transfer beside the steps did not bring

    def _waits_for_prefix(self, leg: Leg) -> bool:
        """Whether it has one to wait for. In its turn the leg gets blocks for that, unless it has all by
        now."""
        if not leg.fetch or leg.given or self.world.happens(0.6):
            return leg.fetch > 0
        if self.world.happens(0.1):
            leg.fetch = 0
            self.world.seen["was here"] += 1
        else:
            leg.given = True
            self.copiers.given(leg.id)
        return leg.fetch > 0

    def _come_in_ahead(self, leg: Leg, outputs: list[EngineCoreOutput]) -> bool | None:
        if not leg.arrived:
            return None
        landed = self.copiers.landed(leg.id)
        if landed:
            leg.computed, leg.ahead = len(leg.prompt), False
            return True
        if landed is False or self.world.happens(0.1):  # it failed, or the step waited in vain
            self._unread(leg, outputs)
        return None

    def _unread(self, leg: Leg, outputs: list[EngineCoreOutput]) -> None:
        self._end(leg.id)
        outputs.append(EngineCoreOutput(leg.id, [], finish_reason=FinishReason.ERROR, stop_reason=UNREAD))

    def _make(self, leg: Leg) -> EngineCoreOutput:
        token = leg.next_token()
        leg.made.append(token)
        leg.left -= 1
        if leg.left <= 0:
            self._end(leg.id)
            return EngineCoreOutput(leg.id, [token], finish_reason=FinishReason.LENGTH)
        if not (leg.hand_over or leg.id in self.leaving):
            return EngineCoreOutput(leg.id, [token])
        self._end(leg.id)
        final = len(leg.prompt) + len(leg.made) - 1
        blocks = -(-final // BLOCK)
        self.held[leg.id] = blocks
        params = {
            "do_remote_prefill": True,
            "remote_num_tokens": final,
            "remote_block_ids": (list(range(blocks)),),
            "remote_request_id": leg.id,
            "remote_engine_id": self.engine_id,
        }
        return EngineCoreOutput(
            leg.id, [token], finish_reason=FinishReason.STOP, stop_reason=LEFT, kv_transfer_params=params
        )
