"""Moves whose KV is copied while the request still runs at its source.

A full block never changes. So the target gets the request before it has left, keeps blocks for it, and copies
what is full (More); then the source is told to let it go, and after its last token only the tail is missing.
After a prefill it is the same: what was computed by earlier chunks travels while later ones are computed.
There the source pins what is full after each step, and its word on that step has it: a question would wait
until the step after is over, and with it, maybe, the prompt.

    source                          server                           target
    pin full blocks        <------  begin
                                    taken up   ----- request ----->  keeps blocks for it
                                               ----- More --------->  copies
    leaves after its token <------  copied     <---- Copied -------
    last token             ------>  left       ----- More, last -->  copies the tail
                                               ----- arrive ------>  is in the next step

Whatever ends it early gives everything back: the target's blocks once nothing is written into them any more,
the source's once nothing is read from them (Dropped).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from taichi_serve.cluster.vllm.server.instance import Engine
from taichi_serve.cluster.vllm.server.leg import Going, Held, Live, ahead_id, next_leg
from taichi_serve.cluster.vllm.wire import Call, Copied, Drop, Dropped, Failed, More, Word

# Tokens that the target keeps room for beyond those it knows of: what the request makes until it leaves.
# Fewer where the model's context ends before.
ROOM = 32

Then = Callable[..., Any]


@dataclass(slots=True, eq=False)
class Ahead:
    """One leg that is copied ahead. Times are time.monotonic()."""

    live: Live
    going: Going
    source: Engine
    target: Engine
    source_leg: str
    leave: bool  # whether the source is to let it go as soon as its full blocks are copied
    request: str = ""  # its id at the target
    known: int = -1  # output tokens that the target was sent; -1 before
    room: int = 0  # tokens more that it keeps blocks for
    ready: bool = False  # full blocks are there
    over: bool = False
    gone: bool = False  # it left, and its tail was asked for
    began: float = 0.0
    copied: float = 0.0
    tail_began: float = 0.0
    landed: float = 0.0
    blocks: int = 0  # copied, those of the tail too
    seconds: float = 0.0  # of copying
    late: asyncio.TimerHandle | None = field(default=None, repr=False)

    def matches(self, going: Going) -> bool:
        """Whether it is this move that it was begun for."""
        return not self.over and (self.going.leg, self.going.to) == (going.leg, going.to)


class Aheads:
    """All moves that are copied ahead. One whose full blocks are not there after `patience` seconds is given
    up: the request stays where it is. `refuse` is called where one does not happen, `recompute` where its KV
    was lost on the last stretch, `direct` says whether an instance reads another's memory."""

    def __init__(
        self, patience: float, refuse: Then, recompute: Then, direct: Callable[[Engine, Engine], bool]
    ) -> None:
        self._patience = patience
        self._refuse = refuse
        self._recompute = recompute
        self._direct = direct
        self._by_request: dict[str, Ahead] = {}  # by its id at the target

    # ------------------------------------------------------------------------------------ before it leaves

    def begin(self, live: Live, going: Going, source: Engine, target: Engine, leave: bool) -> bool:
        """Begin to copy; False where it cannot be done. With `leave` the source lets the request go when its
        full blocks are there."""
        if source is target or not (source.alive and target.alive):
            return False
        if live.ahead is not None:
            self.cancel(live)
        ahead = Ahead(live, going, source, target, live.engine_request, leave)
        ahead.request = ahead_id(live, going.leg)
        live.ahead = self._by_request[ahead.request] = ahead
        if leave:
            ahead.late = asyncio.get_running_loop().call_later(self._patience, self._late, ahead)
        blocks = None
        if not leave:
            blocks, source.pinned[ahead.source_leg] = source.pinned.get(ahead.source_leg), None
        if blocks:
            self._have(ahead, blocks)
        else:
            self._ask(ahead)
        return True

    def pinned(self, source: Engine, leg: str, reader: str, blocks: list[int]) -> None:
        """A prefill that will be handed over has computed so much, and it is pinned for `reader`."""
        live = source.legs.get(leg)
        if live is None:  # it was ended from outside while that step ran
            source.unpin(reader)
        elif (ahead := live.ahead) is not None and ahead.source is source and not ahead.over:
            self._have(ahead, blocks)
        elif source.pinned.get(leg, blocks) is not None:
            source.pinned[leg] = blocks

    def _ask(self, ahead: Ahead) -> None:
        answer = asyncio.ensure_future(
            ahead.source.client.call_utility_async(Call.PIN, ahead.source_leg, ahead.request)
        )
        answer.add_done_callback(lambda task: self._pinned(ahead, task))

    def _pinned(self, ahead: Ahead, answer: asyncio.Task[Any]) -> None:
        failed = answer.cancelled() or answer.exception() is not None
        if failed or ahead.over or ahead.gone:
            ahead.source.unpin(
                ahead.request
            )  # what was pinned just now, after everything else had been given back
            return
        blocks: list[int] | None = answer.result()
        if blocks is None:  # it is over there, or its model's KV cannot be copied so
            self._give_up(ahead)
        else:
            self._have(ahead, blocks)

    def _have(self, ahead: Ahead, blocks: list[int]) -> None:
        """These are full and pinned: the target is to copy what it does not have of them."""
        if ahead.known < 0:
            longest = ahead.target.client.vllm_config.model_config.max_model_len
            ahead.room = min(
                ROOM, longest - len(ahead.live.request.prompt_token_ids or ()) - len(ahead.live.tokens)
            )
            if ahead.room < 1:
                self._give_up(ahead)
                return
            ahead.known = len(ahead.live.tokens)
            ahead.target.client.add(next_leg(ahead.live, None, ahead.request, ahead.room))
        ahead.target.copiers.send(More(ahead.request, ahead.source.process.engine_id, blocks))

    def _give_up(self, ahead: Ahead) -> None:
        """Let it move as if nothing had been tried."""
        self._end(ahead)
        if ahead.leave and ahead.source.alive:
            ahead.source.leave(ahead.source_leg)

    def _late(self, ahead: Ahead) -> None:
        if not (ahead.ready or ahead.over):
            self._stay(ahead, f"{ahead.target.name} did not get its KV within {self._patience:g} s")

    def _stay(self, ahead: Ahead, why: str) -> None:
        self._end(ahead)
        if ahead.leave:
            self._refuse(ahead.live, ahead.going.leg, why)

    # ------------------------------------------------------------------------------------- when it has left

    def left(self, live: Live, going: Going, held: Held | None) -> Ahead | None:
        """The source made the last token. The move if only its tail is missing, which is then on its way;
        None where nothing was copied ahead for it."""
        ahead = live.ahead
        if ahead is None:
            return None
        if held is None or not (ahead.ready and ahead.matches(going) and self._fits(ahead, held)):
            self.cancel(live)
            return None
        ahead.gone = True
        blocks = list(held.params["remote_block_ids"][0])
        note = held.params["remote_request_id"]
        if self._direct(ahead.source, ahead.target):  # then the tail is there before the step that needs it
            self._arrive(ahead)
        ahead.target.copiers.send(More(ahead.request, ahead.source.process.engine_id, blocks, note))
        return ahead

    def _fits(self, ahead: Ahead, held: Held) -> bool:
        kept = len(ahead.live.request.prompt_token_ids or ()) + ahead.known + ahead.room
        return bool(held.params["remote_num_tokens"] < kept)

    def _arrive(self, ahead: Ahead) -> None:
        tokens = ahead.live.tokens[ahead.known :]
        call = ahead.target.client.call_utility_async(Call.ARRIVE, ahead.request, tokens)
        answer = asyncio.ensure_future(call)
        answer.add_done_callback(lambda task: self._arrived(ahead, task))

    def _arrived(self, ahead: Ahead, answer: asyncio.Task[Any]) -> None:
        if not answer.cancelled() and answer.exception() is None and not answer.result():
            self._recompute(ahead.live, ahead.going.leg)

    # --------------------------------------------------------------------------------- what the copiers say

    def hear(self, word: Word) -> None:
        """A word of a target's copiers."""
        ahead = self._by_request.get(word.leg)
        if ahead is None:
            return
        match word:
            case Copied(last=True):
                self._landed(ahead, word)
            case Copied():
                self._copied(ahead, word)
            case Dropped():
                self._forget(ahead)
            case Failed() if ahead.gone:
                self._forget(ahead)
                if not ahead.over:
                    self._recompute(ahead.live, ahead.going.leg)
            case Failed(why=why) if not ahead.over:
                self._stay(ahead, why)

    def _copied(self, ahead: Ahead, word: Copied) -> None:
        if ahead.over:
            return
        ahead.began, ahead.copied = ahead.began or word.began, word.ended
        ahead.blocks, ahead.seconds = word.copied, word.seconds
        first, ahead.ready = not ahead.ready, True
        if first and ahead.leave:
            ahead.source.leave(ahead.source_leg)

    def _landed(self, ahead: Ahead, word: Copied) -> None:
        ahead.tail_began, ahead.landed = word.began, word.ended
        ahead.blocks, ahead.seconds = word.copied, word.seconds
        if ahead.gone and not ahead.over and not self._direct(ahead.source, ahead.target):
            self._arrive(ahead)
        self._forget(ahead)

    # ----------------------------------------------------------------------------------------- the end of it

    def cancel(self, live: Live) -> None:
        """It is not wanted any more, or not in this way."""
        if live.ahead is not None:
            self._end(live.ahead)

    def _end(self, ahead: Ahead) -> None:
        if ahead.live.ahead is ahead:
            ahead.live.ahead = None
        if ahead.over:
            return
        ahead.over = True
        if ahead.late is not None:
            ahead.late.cancel()
        if ahead.request not in self._by_request:
            return  # all of it has been copied, and given back
        if ahead.target.alive:
            if ahead.known >= 0 and not ahead.gone:  # once gone, whoever ends the leg aborts it
                ahead.target.client.abort([ahead.request])
            ahead.target.copiers.send(Drop(ahead.request))
        else:
            self._forget(ahead)

    def lost(self, engine: Engine) -> None:
        """An instance is gone."""
        for ahead in list(self._by_request.values()):
            if engine is ahead.target:
                self._end(ahead)
                self._forget(ahead)
            elif engine is ahead.source and not ahead.gone:  # once gone, its copier finds out
                self._end(ahead)

    def _forget(self, ahead: Ahead) -> None:
        """Nothing is read for it any more."""
        self._by_request.pop(ahead.request, None)
        if ahead.late is not None:
            ahead.late.cancel()
        if ahead.gone and not ahead.landed and ahead.source.alive:
            ahead.source.release(ahead.source_leg)  # no reader will say that it has it
        ahead.source.unpin(ahead.request)
