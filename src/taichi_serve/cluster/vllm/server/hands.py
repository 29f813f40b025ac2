"""Acts of journeys, carried out: each is a message to an engine, a fact for the scheduler, or a timer.

What engines and copiers answer goes back into the journey it is about. Nothing here decides, and nothing is
remembered of a request but which journey a leg or a passage belongs to.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from taichi_serve.cluster.vllm.server import acts as do
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.leg import first_leg, next_leg
from taichi_serve.cluster.vllm.server.passage import Passage, Passing
from taichi_serve.cluster.vllm.server.prefix import prefix_hashes
from taichi_serve.cluster.vllm.wire import Copied, Dropped, Failed, Word
from taichi_serve.messages import Event, Finished, Outcome, Refused
from taichi_serve.stage import TransitionError

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.server.journey import Journey

log = logging.getLogger("taichi.journey")

Tell = Callable[[Event], None]


class Hands:
    """Carries out acts. `tell` takes facts, `fail` tells a user that a request failed, `later(seconds, call)`
    is a timer."""

    def __init__(
        self,
        tell: Tell,
        fail: Callable[[Journey], None],
        patience: float,
        later: Callable[..., object] | None = None,
    ) -> None:
        self.journeys: dict[str, Journey] = {}
        self.passages: dict[str, Passage] = {}  # by reader, until they are closed
        self.astray = 0  # journeys that were ended because they went where no journey goes
        self._tell = tell
        self._fail = fail
        self._patience = patience
        self._later = later or (lambda seconds, call: asyncio.get_running_loop().call_later(seconds, call))
        self._does: dict[type[Any], Callable[[Journey, Any], None]] = {
            do.Add: self._add,
            do.Send: self._send,
            do.PutOff: lambda journey, act: _engine(act.seat).put_off(act.leg, act.by),
            do.Adopt: lambda journey, act: _engine(act.seat).adopt(act.leg, journey),
            do.Settle: lambda journey, act: _engine(act.seat).settle(act.leg, journey.id),
            do.Forget: lambda journey, act: _engine(act.seat).forget(act.leg),
            do.End: lambda journey, act: _engine(act.seat).end(act.leg),
            do.Leave: lambda journey, act: _engine(act.seat).leave(act.leg),
            do.Release: lambda journey, act: _engine(act.seat).release(act.leg, act.reader),
            do.Pin: self._pin,
            do.Find: self._find,
            do.Drop: lambda journey, act: self._drop(act),
            do.Close: lambda journey, act: self._close(act),
            do.Copy: self._copy,
            do.Fetched: lambda journey, act: _target(act).fetched(act.passage.reader, act.blocks),
            do.Waive: self._waive,
            do.Uncopy: lambda journey, act: _target(act).uncopy(act.passage.reader),
            do.Arrive: self._arrive,
            do.Await: self._await,
            do.Refuse: self._refuse,
            do.Finish: self._finish,
        }

    def take(self, journey: Journey, what: Callable[..., do.Acts], *facts: Any) -> None:
        """Have the journey take a fact or a decision, and carry out what it answers. Where it goes astray the
        request ends with an error: it alone, and not the server."""
        try:
            acts = what(*facts)
        except TransitionError:
            log.exception("a request went astray and is ended")
            self.astray += 1
            acts = journey.end(Outcome.FAILED)
        for act in acts:
            self._does[type(act)](journey, act)

    def hear(self, word: Word) -> None:
        """A word of a target's copiers."""
        passage = self.passages.get(word.leg)
        journey = self.journeys.get(passage.request) if passage is not None else None
        if passage is None or journey is None:
            return
        times, here = passage.times, _engine(passage.target).offset.here
        match word:
            case Copied(last=True):
                times.tail_began, times.landed = here(word.began), here(word.ended)
                times.blocks, times.seconds = word.copied, word.seconds
                self.take(journey, journey.landed, passage)
            case Copied():
                times.began, times.copied = times.began or here(word.began), here(word.ended)
                times.blocks, times.seconds = word.copied, word.seconds
                self.take(journey, journey.copied, passage)
            case Failed(why=why):
                self.take(journey, journey.failed, passage, why)
            case Dropped():
                pass  # the engine's own answer comes, too, and it knows of all its workers

    def silent(self, engine: Engine, on: bool) -> None:
        """An instance does not answer, or answers again."""
        for journey in list(self.journeys.values()) if on else ():
            self.take(journey, journey.silent, engine)

    def lost(self, engine: Engine) -> None:
        """An instance is gone: that is an answer to everything it was asked."""
        for journey in list(self.journeys.values()):
            self.take(journey, journey.lost, engine)
        for passage in list(self.passages.values()):
            if passage.target is engine and passage.passing is Passing.DROPPING:
                self._closed(passage)

    # ----------------------------------------------------------------------------------- act by act

    def _add(self, journey: Journey, act: do.Add) -> None:
        engine = _engine(act.seat)
        engine.recomputed_late += act.again
        engine.adopt(act.leg, journey)
        if journey.tokens:
            engine.send(next_leg(journey.request, act.leg, journey.tokens, place=journey.place))
        else:
            bound = not journey.movable
            engine.send(first_leg(journey.request, act.leg, act.reader, act.fetch, journey.place, bound))

    def _send(self, journey: Journey, act: do.Send) -> None:
        passage, target = act.passage, _engine(act.passage.target)
        self.passages[passage.reader] = passage
        if act.kv is not None:
            target.adopt(passage.reader, journey)
        leg = next_leg(journey.request, passage.reader, journey.tokens, act.kv, act.room, journey.place)
        target.send(leg)

    def _pin(self, journey: Journey, act: do.Pin) -> None:
        passage = act.passage
        self.passages[passage.reader] = passage

        def pinned(answer: asyncio.Future[list[int] | None]) -> None:
            failed = answer.cancelled() or answer.exception() is not None
            self.take(journey, journey.pinned, passage, None if failed else answer.result())

        _engine(passage.source).pin(passage.source_leg, passage.reader).add_done_callback(pinned)

    def _find(self, journey: Journey, act: do.Find) -> None:
        passage = act.passage
        self.passages[passage.reader] = passage
        asking = asyncio.ensure_future(self._ask_for(journey, act))

        def found(answer: asyncio.Future[list[int]]) -> None:
            failed = answer.cancelled() or answer.exception() is not None
            self.take(journey, journey.found, passage, [] if failed else answer.result())

        asking.add_done_callback(found)

    async def _ask_for(self, journey: Journey, act: do.Find) -> list[int]:
        source = _engine(act.passage.source)
        hashes = await prefix_hashes(journey.request, act.blocks, source.client.vllm_config.cache_config)
        if act.passage is not journey.fetch:
            return []  # it was given up meanwhile, and what would be pinned now nobody would let go
        return await source.find(act.passage.reader, hashes)

    def _waive(self, journey: Journey, act: do.Waive) -> None:
        passage = act.passage

        def waived(answer: asyncio.Future[bool]) -> None:
            if not answer.cancelled() and answer.exception() is None:
                self.take(journey, journey.waived, passage, answer.result())

        _engine(passage.target).waive(passage.reader).add_done_callback(waived)

    def _drop(self, act: do.Drop) -> None:
        passage = act.passage
        answer = _engine(passage.target).drop(passage.reader, act.copied)
        answer.add_done_callback(lambda answer: self._dropped(passage, answer))

    def _dropped(self, passage: Passage, answer: asyncio.Future[bool]) -> None:
        if not answer.cancelled() and answer.exception() is None and passage.passing is Passing.DROPPING:
            self._closed(passage)  # without an answer the target is about to be lost, or ended for silence

    def _closed(self, passage: Passage) -> None:
        passage.close()
        self._close(do.Close(passage))

    def _close(self, act: do.Close) -> None:
        passage = act.passage
        self.passages.pop(passage.reader, None)
        _engine(passage.source).release(passage.source_leg if passage.owns else None, passage.reader)

    def _copy(self, journey: Journey, act: do.Copy) -> None:
        passage = act.passage
        engine = _engine(passage.target)
        engine.copy(passage.reader, passage.source.engine_id, act.blocks, act.note, act.whole)

    def _arrive(self, journey: Journey, act: do.Arrive) -> None:
        passage = act.passage

        def arrived(answer: asyncio.Future[bool]) -> None:
            if not answer.cancelled() and answer.exception() is None and not answer.result():
                self.take(journey, journey.failed, passage, "it has no blocks there")

        _engine(passage.target).arrive(passage.reader, act.tokens).add_done_callback(arrived)

    def _await(self, journey: Journey, act: do.Await) -> None:
        self._later(self._patience, lambda: self.take(journey, journey.late, act.mark))

    def _refuse(self, journey: Journey, act: do.Refuse) -> None:
        self._tell(Refused(time.monotonic(), journey.id, act.leg, act.why, len(journey.tokens)))

    def _finish(self, journey: Journey, act: do.Finish) -> None:
        self.journeys.pop(journey.id, None)
        if journey.warm is not None:
            if not journey.warm.done():
                journey.warm.set_result(len(journey.tokens))
            return
        self._tell(Finished(time.monotonic(), journey.id, len(journey.tokens), act.outcome))
        if act.outcome is Outcome.FAILED and not act.said:
            self._fail(journey)


def _target(act: do.Fetched | do.Uncopy) -> Engine:
    return _engine(act.passage.target)


def _engine(seat: do.Seat) -> Engine:
    return cast(Engine, seat)
