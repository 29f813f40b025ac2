"""The real cluster: decisions become engine requests, engine outputs become facts and the user's tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

from taichi_serve.cluster.vllm.server import facts
from taichi_serve.cluster.vllm.server.ahead import Aheads
from taichi_serve.cluster.vllm.server.exact import bound_by
from taichi_serve.cluster.vllm.server.leg import Going, Held, Live, engine_id, first_leg, next_leg
from taichi_serve.cluster.vllm.transfer import LEASE
from taichi_serve.cluster.vllm.wire import LEFT, UNREAD, Gone, TransferParams, direct
from taichi_serve.messages import (
    Abort,
    Ahead,
    Arrived,
    Cancelled,
    Command,
    Decode,
    Event,
    Finished,
    Flow,
    Lost,
    Move,
    Outcome,
    Prefill,
    Refused,
    SetChunk,
)

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.server.instance import Engine

# A leg is only sent to pull KV while most of the source's lease is left; later it is computed again.
FRESH = LEASE / 2


class VllmCluster:
    """Several engine cores behind one port. `deliver` gets the outputs that belong to users.

    Everything runs on the event loop of the server: no locks. Times are `time.monotonic()` seconds.
    """

    def __init__(
        self,
        engines: list[Engine],
        deliver: Callable[[EngineCoreOutputs], None],
        move_timeout: float = 10.0,
    ) -> None:
        self.engines = engines
        self.live: dict[str, Live] = {}
        self._index = {engine.name: engine.index for engine in engines}
        self._deliver = deliver
        self._move_timeout = move_timeout
        self._v2 = bool(engines and engines[0].client.vllm_config.use_v2_model_runner)
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.aheads = Aheads(move_timeout, self._stay, self._recompute, self._direct)

    # ------------------------------------------------------------------------------------------ the port

    async def events(self) -> AsyncIterator[Event]:
        """Facts as they become known, until `close`."""
        while (event := await self._events.get()) is not None:
            yield event

    def send(self, command: Command) -> None:
        """Carry out a decision. What comes too late is dropped; what cannot be done becomes a fact."""
        if isinstance(command, SetChunk):
            self.engines[self._index[command.instance]].set_chunk(command)
            return
        live = self.live.get(command.request)
        if live is None:
            return
        match command:
            case Prefill(on=on, leg=leg, hand_over=hand_over):
                self._prefill(live, leg, self._index[on], hand_over)
            case Ahead(to=to, leg=leg):
                self._ahead(live, Going(leg, self._index[to], Move.HAND_OVER))
            case Decode(on=on, leg=leg, move=move):
                self._decode(live, Going(leg, self._index[on], move))
            case Flow(to=to, leg=leg, move=move):
                self._flow(live, Going(leg, self._index[to], move))
            case Abort(outcome=outcome):
                self.end(live, outcome)

    def open(self) -> None:
        """From here on facts count; those of the rehearsals before are forgotten."""
        self._events = asyncio.Queue()
        for engine in self.engines:
            engine.recomputed_late = 0

    def close(self) -> None:
        """No more facts."""
        self._events.put_nowait(None)

    def tell(self, event: Event) -> None:
        """A fact from outside the engines: an operator's wish."""
        self._events.put_nowait(event)

    # ------------------------------------------------------------------------------ from the front end

    def accept(self, request: EngineCoreRequest) -> None:
        """A new request of a user."""
        live = Live(request, last_at=time.monotonic())
        self.live[live.id] = live
        params = request.sampling_params
        why = bound_by(request, self._v2)
        self._events.put_nowait(
            Arrived(
                at=live.last_at,
                request=live.id,
                prompt_tokens=len(request.prompt_token_ids or ()),
                max_tokens=(params.max_tokens if params is not None else 1) or 1,
                movable=why is None,
                bound_by=why or "",
            )
        )

    def abandon(self, request_id: str, cancelled: bool) -> None:
        """Nobody wants the rest: the client left (`cancelled`), or a stop string was found."""
        live = self.live.get(request_id)
        if live is None:
            return
        if cancelled:
            self._events.put_nowait(Cancelled(time.monotonic(), request_id))
        else:
            self.end(live, Outcome.FINISHED)

    def rehearse(self, request: EngineCoreRequest, at: int, to: int | None) -> asyncio.Future[int]:
        """Prefill a request of our own on `at` and move it to `to`; the future gets its output tokens."""
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        live = Live(request, last_at=time.monotonic(), warm=done)
        self.live[live.id] = live
        self._prefill(live, 0, at, hand_over=to is not None)
        if to is not None:
            live.going = Going(1, to, Move.HAND_OVER)
        return done

    # ---------------------------------------------------------------------------------------- decisions

    def _prefill(self, live: Live, leg: int, to: int, hand_over: bool) -> None:
        self._begin(live, leg, to)
        if live.tokens:  # it was lost after it had begun: go on from the tokens so far
            self._add(live, next_leg(live, None))
        else:
            self._add(live, first_leg(live, hand_over))

    def _ahead(self, live: Live, going: Going) -> None:
        """Copy what a prefill has computed so far to where its decode will be."""
        if live.instance >= 0 and live.awaiting:
            source, target = self.engines[live.instance], self.engines[going.to]
            self.aheads.begin(live, going, source, target, leave=False)

    def _flow(self, live: Live, going: Going) -> None:
        if live.instance < 0 or live.going is not None:
            return  # between two legs: the fact that ends this will bring a new decision
        live.going = going
        source, target = self.engines[live.instance], self.engines[going.to]
        if not self.aheads.begin(live, going, source, target, leave=True):
            source.leave(live.engine_request)

    def _decode(self, live: Live, going: Going) -> None:
        """Begin the next leg with the KV that is held, if it can still be had in time."""
        if (
            live.instance >= 0 and self.engines[live.instance].alive
        ):  # its move was given up with the instance it was to go to: it still runs here
            live.going = None
            if live.instance == going.to:
                self._stay(live, going.leg, "it still runs there")
            else:
                self._flow(live, going)
            return
        held, live.held = live.held, None
        if (ahead := self.aheads.left(live, going, held)) is not None:
            self._begin(live, going.leg, going.to)
            live.engine_request, live.reader = ahead.request, held
            self.engines[going.to].adopt(live)
            self._await(live)
            return
        if held is not None and (held.instance == going.to or not self._usable(held)):
            self._release(held)  # back on the same instance, its prefix cache still has the blocks
            held = None
        self._begin(live, going.leg, going.to)
        live.reader = held
        self._add(live, next_leg(live, held.params if held else None))
        if held is not None:
            self._await(live)

    def _await(self, live: Live) -> None:
        loop = asyncio.get_running_loop()
        live.deadline = loop.call_later(self._move_timeout, self._recompute, live, live.leg)

    def _direct(self, source: Engine, reader: Engine) -> bool:
        ids = reader.process.engine_id, source.process.engine_id
        return direct(source.process.log.parent, *ids, source.copiers.ranks)

    def _stay(self, live: Live, leg: int, why: str) -> None:
        """A move did not happen; the request goes on where it is."""
        live.going = None
        self._events.put_nowait(Refused(time.monotonic(), live.id, leg, why, len(live.tokens)))

    def _usable(self, held: Held) -> bool:
        return self.engines[held.instance].alive and time.monotonic() - held.at < FRESH

    def _begin(self, live: Live, leg: int, to: int) -> None:
        live.leg, live.instance, live.awaiting, live.going = leg, to, True, None
        live.engine_request = engine_id(live)

    def _add(self, live: Live, request: EngineCoreRequest) -> None:
        if live.tokens and bound_by(
            live.request, self._v2
        ):  # its instance died, and no other could go on exactly
            live.instance = -1
            self.end(live, Outcome.FAILED)
        else:
            self.engines[live.instance].add(live, request)

    def _recompute(self, live: Live, leg: int) -> None:
        """The KV did not come, or not in time: compute the tokens so far again, on the same instance."""
        if self.live.get(live.id) is not live or live.leg != leg or not live.awaiting:
            return
        engine = self.engines[live.instance]
        engine.drop(live)
        self.aheads.cancel(live)
        live.cancel_deadline()
        live.reader = None  # the source frees its blocks when the pull or the lease ends
        live.engine_request = f"{live.engine_request}~"
        engine.recomputed_late += 1
        request = next_leg(live, None)
        request.request_id = live.engine_request
        self._add(live, request)

    def _unread(self, live: Live) -> None:
        """Its engine could not read the KV. Where it was copied ahead, the copier says when the source may
        free it."""
        held = live.reader if live.ahead is None else None
        self._recompute(live, live.leg)
        if held is not None:
            self._release(held)

    def _release(self, held: Held) -> None:
        self.engines[held.instance].release(held.engine_request)

    # -------------------------------------------------------------------------------------- the end

    def end(self, live: Live, outcome: Outcome) -> None:
        """Forget a request on every leg: abort what runs, free what is held, tell the user if it failed."""
        if self.live.pop(live.id, None) is None:
            return
        live.cancel_deadline()
        self.aheads.cancel(live)
        if live.instance >= 0:
            self.engines[live.instance].drop(live)
        if live.held is not None:
            self._release(live.held)
        self._finished(live, outcome)
        if outcome is Outcome.FAILED:
            output = EngineCoreOutput(live.id, [], finish_reason=FinishReason.ERROR)
            self._deliver(EngineCoreOutputs(outputs=[output]))

    def _finished(self, live: Live, outcome: Outcome) -> None:
        if live.warm is not None:
            if not live.warm.done():
                live.warm.set_result(len(live.tokens))
            return
        self._events.put_nowait(Finished(time.monotonic(), live.id, len(live.tokens), outcome))

    # ------------------------------------------------------------------------------ from the engines

    def receive(self, engine: Engine, outputs: EngineCoreOutputs) -> None:
        """The outputs of one step: facts first, then the users' tokens."""
        now = time.monotonic()
        engine.heard_at = now
        if (step := facts.stepped(engine, outputs, now)) is not None:
            self._events.put_nowait(step)
            for leg, (reader, blocks) in engine.news.items():
                self.aheads.pinned(engine, leg, reader, blocks)
        kept: list[EngineCoreOutput] = []
        for output in outputs.outputs:
            live = engine.legs.get(output.request_id)
            if live is None:  # a late word about a leg that is over: it may have left before it was ended
                if output.stop_reason == LEFT:
                    engine.release(output.request_id)
            else:
                self._take(engine, live, output, now)
                if live.warm is None and (output.new_token_ids or output.finish_reason is not None):
                    kept.append(output)
        outputs.outputs = kept
        outputs.engine_index = engine.index
        if kept or outputs.scheduler_stats is not None:
            self._deliver(outputs)

    def _take(self, engine: Engine, live: Live, output: EngineCoreOutput, now: float) -> None:
        """One output of one request; what only this system knows is taken out of it."""
        before = live.last_at
        live.tokens.extend(output.new_token_ids)
        live.last_at = now
        left = output.stop_reason == LEFT and output.finish_reason is not None
        if live.awaiting and output.new_token_ids:
            self._first_token(engine, live, output, now - before, held=left and live.going is None)
        output.request_id = live.id
        params, output.kv_transfer_params = output.kv_transfer_params, None
        if live.leg > 0:  # the front end counts a request's queueing and prefill once
            output.prefill_stats = output.events = None
        if left:
            output.finish_reason = output.stop_reason = None
            self._left(engine, live, params, now)
        elif output.stop_reason == UNREAD:
            output.finish_reason = output.stop_reason = None
            self._unread(live)
        elif output.finish_reason is not None:
            failed = output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT)
            self._over(engine, live, Outcome.FAILED if failed else Outcome.FINISHED)

    def _first_token(
        self, engine: Engine, live: Live, output: EngineCoreOutput, gap: float, held: bool
    ) -> None:
        live.awaiting = False
        live.cancel_deadline()
        live.reader = None
        engine.settle(live)
        if live.warm is not None:
            return
        self._events.put_nowait(facts.began(engine, live, output, gap, held))
        if live.ahead is not None and live.ahead.request == live.engine_request:
            live.ahead = None

    def _left(self, engine: Engine, live: Live, params: TransferParams | None, now: float) -> None:
        """The leg is over and its KV is pinned: go where it was told to, or wait for a Decode."""
        engine.forget(live)
        live.left_at = engine.made_at
        if params is not None:
            live.held = Held(engine.index, live.engine_request, params, now)
        live.instance = -1
        going, live.going = live.going, None
        if going is not None:
            self._decode(live, going)

    def _over(self, engine: Engine, live: Live, outcome: Outcome) -> None:
        engine.forget(live)
        live.cancel_deadline()
        self.aheads.cancel(live)
        del self.live[live.id]
        self._finished(live, outcome)

    # ---------------------------------------------------------------------------------------- losses

    def lose(self, engine: Engine, why: str) -> None:
        """An instance is gone: its legs wait for new decisions, moves away from it go on without KV."""
        if not engine.alive:
            return
        engine.alive = False
        self.aheads.lost(engine)
        for other in self.engines:
            if other.alive:
                other.copiers.send(Gone(engine.process.engine_id))
        for live in self.live.values():
            if live.going is not None and live.going.to == engine.index:
                live.going = None  # the loss brings another decision
        stranded = list(engine.legs.values())
        engine.legs.clear()
        engine.residents.clear()
        for live in stranded:
            live.cancel_deadline()
            live.instance, live.reader = -1, None
            if live.warm is not None:
                self.end(live, Outcome.FAILED)
        self._events.put_nowait(Lost(time.monotonic(), engine.name, why))
        for live in stranded:
            if live.going is not None and live.id in self.live:
                self._decode(live, live.going)
