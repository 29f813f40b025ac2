"""The real cluster: decisions become engine requests, engine outputs become facts and the user's tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import PrefillStats

from taichi_serve.classes import PLAIN, Terms
from taichi_serve.cluster.vllm.server import facts, figures
from taichi_serve.cluster.vllm.server.acts import Place, Seat
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.exact import bound_by
from taichi_serve.cluster.vllm.server.hands import Hands
from taichi_serve.cluster.vllm.server.itinerary import Going, Road
from taichi_serve.cluster.vllm.server.journey import Journey
from taichi_serve.cluster.vllm.server.membership import Membership
from taichi_serve.cluster.vllm.server.offset import arrived
from taichi_serve.cluster.vllm.server.prefix import to_fetch
from taichi_serve.cluster.vllm.wire import LEFT, UNREAD, Failed
from taichi_serve.messages import (
    Abort,
    Ahead,
    Arrived,
    Cancelled,
    Command,
    Decode,
    Demote,
    Event,
    Flow,
    Outcome,
    Prefill,
    SetChunk,
)
from taichi_serve.stage import Stage

STREAMING = (Stage.DECODING, Stage.LEAVING)


class VllmCluster(Membership):
    """Several engine cores behind one port. `deliver` gets the outputs that belong to users.

    Everything runs on the event loop of the server: no locks. Times are `time.monotonic()` seconds.
    """

    def __init__(
        self,
        engines: list[Engine],
        deliver: Callable[[EngineCoreOutputs], None],
        move_timeout: float = 10.0,
        later: Callable[..., object] | None = None,
    ) -> None:
        super().__init__(engines)
        self._deliver = deliver
        self._v2 = bool(engines and engines[0].client.vllm_config.use_v2_model_runner)
        self._caching = bool(engines and engines[0].client.vllm_config.cache_config.enable_prefix_caching)
        self._prefilled: list[PrefillStats] = []  # of requests whose first tokens came with these outputs
        self.stays: str | None = None  # why no request of this model can move
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.hands = Hands(self.tell, self._fail, move_timeout, later)
        self.journeys = self.hands.journeys
        self._road = Road(self.direct, move_timeout)

    # ------------------------------------------------------------------------------------------ the port

    async def events(self) -> AsyncIterator[Event]:
        """Facts as they become known, until `close`."""
        while (event := await self._events.get()) is not None:
            self._learned(event)
            yield event

    def send(self, command: Command) -> None:
        """Carry out a decision. What comes too late is dropped; what cannot be done becomes a fact."""
        known = self._known
        if isinstance(command, SetChunk):
            if (engine := known.get(command.instance)) is not None:
                engine.set_chunk(command)
            return
        journey, to = self.journeys.get(command.request), _to(command)
        if journey is None or (to is not None and to not in known):  # its target left meanwhile
            return
        take = self.hands.take
        match command:
            case Prefill(on=on, leg=leg, hand_over=hand_over):
                place = Place(command.by, command.best_effort)
                prefix = to_fetch(journey.request, command, known)
                take(journey, journey.prefill, leg, known[on], hand_over, prefix, place)
            case Demote(leg=leg, by=by):
                take(journey, journey.demote, leg, by)
            case Ahead(to=to):
                take(journey, journey.hint, known[to])
            case Decode(on=on, leg=leg):
                take(journey, journey.decode, leg, known[on])
            case Flow(to=to, leg=leg):
                take(journey, journey.flow, leg, known[to])
            case Abort(outcome=outcome):
                take(journey, journey.end, outcome)

    def open(self) -> None:
        """From here on facts count; those of the rehearsals before are forgotten."""
        self._events = asyncio.Queue()
        for engine in self.engines:
            self.locate(engine)
            engine.recomputed_late = 0
            engine.follow(self.hasher)

    def close(self) -> None:
        """No more facts."""
        self._events.put_nowait(None)

    def tell(self, event: Event) -> None:
        """A fact, from the engines or from outside: an operator's wish."""
        self._events.put_nowait(event)

    # ------------------------------------------------------------------------------ from the front end

    async def blocks(self, request: EngineCoreRequest) -> tuple[int, ...]:
        """Hashes of the full blocks of a prompt, as instances tell them; none where nobody would."""
        return () if self.hasher is None else await self.hasher.of(request)

    def accept(self, request: EngineCoreRequest, blocks: tuple[int, ...] = (), terms: Terms = PLAIN) -> None:
        """A new request of a user."""
        why = bound_by(request, self._v2) or self.stays
        journey = self._set_out(request, why is None)
        params = request.sampling_params
        most = (params.max_tokens if params is not None else 1) or 1
        words = why is None, why, blocks, terms.slo, terms.slo_class
        self.tell(Arrived(journey.last_at, journey.id, journey.prompt_tokens, most, *words))

    def _set_out(self, request: EngineCoreRequest, movable: bool) -> Journey:
        length = len(request.prompt_token_ids or ())
        now = time.monotonic()
        journey = Journey(request.request_id, length, movable, self._road, request, now, now)
        self.journeys[journey.id] = journey
        return journey

    def abandon(self, request_id: str, cancelled: bool) -> None:
        """Nobody wants the rest: the client left (`cancelled`), or a stop string was found."""
        journey = self.journeys.get(request_id)
        if journey is not None and cancelled:
            self.tell(Cancelled(time.monotonic(), request_id))
        elif journey is not None:
            self.hands.take(journey, journey.end, Outcome.FINISHED)

    def rehearse(
        self, request: EngineCoreRequest, at: Engine | int, to: Engine | int | None
    ) -> asyncio.Future[int]:
        """Prefill a request of our own on `at` and move it to `to`; the future gets its output tokens. These
        may be engines that have not joined yet."""
        source, target = (
            self.engines[x] if isinstance(x, int) else x for x in (at, at if to is None else to)
        )
        journey = self._set_out(request, movable=True)
        journey.warm = asyncio.get_running_loop().create_future()
        self.hands.take(journey, journey.prefill, 0, source, target is not None)
        if target is not None:
            journey.going = Going(1, target)
        return cast("asyncio.Future[int]", journey.warm)

    def _fail(self, journey: Journey) -> None:
        self._deliver(EngineCoreOutputs(outputs=[figures.failed(journey, time.monotonic())]))

    # ------------------------------------------------------------------------------ from the engines

    def direct(self, source: Seat, reader: Seat) -> bool:
        """Whether one instance reads the memory of another itself."""
        return cast("Engine", reader).process.reads(source.engine_id)

    def receive(self, engine: Engine, outputs: EngineCoreOutputs) -> None:
        """The outputs of one step: facts first, then the users' tokens."""
        if not engine.alive:
            return
        engine.heard_at = now = time.monotonic()
        if engine.process.host:
            arrived(outputs, engine.offset, now)
        if told := facts.told(engine, outputs, now):
            if self.serves(engine):
                for fact in told:
                    self.tell(fact)
            self._take_news(engine)
        outputs.outputs = self._of_users(engine, outputs, now)
        outputs.engine_index = engine.index
        if engine.name not in self._joined:  # nobody knows it yet
            outputs.scheduler_stats = None
        if outputs.scheduler_stats is not None:
            figures.looked_up(outputs.scheduler_stats, self._prefilled, engine.host_blocks is not None)
            self._prefilled.clear()
        if outputs.outputs or outputs.scheduler_stats is not None:
            self._deliver(outputs)

    def _of_users(self, engine: Engine, step: EngineCoreOutputs, now: float) -> list[EngineCoreOutput]:
        """Take its outputs in; those that users are to have, under their requests' own ids."""
        kept = []
        for output in step.outputs:
            journey = engine.legs.get(output.request_id)
            if journey is None:
                self._late(engine, output)
                continue
            if output.finish_reason is None and journey.stage in STREAMING:  # nearly all of them
                journey.tokens.extend(output.new_token_ids)
                journey.last_at = now
                output.request_id = journey.id
            else:
                self._take(engine, journey, output, now)
            if journey.warm is None and (output.new_token_ids or output.finish_reason is not None):
                kept.append(output)
        return kept

    def _late(self, engine: Engine, output: EngineCoreOutput) -> None:
        """A word about a leg that is over: it may have left before it was ended."""
        if output.stop_reason == LEFT:
            engine.release(output.request_id, None)
        elif output.finish_reason is FinishReason.ERROR:  # or about one that is copied ahead
            self.hands.hear(Failed(output.request_id, "its target gave it up"))

    def _take_news(self, engine: Engine) -> None:
        for leg, (reader, blocks) in engine.news.items():
            if (journey := engine.legs.get(leg)) is not None:
                self.hands.take(journey, journey.news, blocks)
            else:  # it was ended from outside while that step ran
                engine.release(None, reader)

    def _take(self, engine: Engine, journey: Journey, output: EngineCoreOutput, now: float) -> None:
        """An output that changes the journey; what only this system knows is taken out of it."""
        before, journey.last_at = journey.last_at, now
        journey.tokens.extend(output.new_token_ids)
        left = output.stop_reason == LEFT and output.finish_reason is not None
        if output.new_token_ids and journey.stage not in STREAMING:
            began = facts.began(engine, journey, output, now - before, held=left)
            if journey.warm is None:
                self.tell(began)
            self.hands.take(journey, journey.first_token)
        output.request_id = journey.id
        params: Any = output.kv_transfer_params
        output.kv_transfer_params = None
        self._correct(journey, output)
        if left:
            journey.left_at = engine.made_at
            output.finish_reason = output.stop_reason = None  # the leg is over, and the request is not
            self.hands.take(journey, journey.left, params)
        elif output.stop_reason == UNREAD:
            output.finish_reason = output.stop_reason = None
            self.hands.take(journey, journey.unread)
        elif output.finish_reason is not None:
            failed = output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT)
            self.hands.take(journey, journey.finished, Outcome.FAILED if failed else Outcome.FINISHED)

    def _correct(self, journey: Journey, output: EngineCoreOutput) -> None:
        """Statistics are those of one request on one instance, however many legs it has (figures.py)."""
        if not output.new_token_ids or len(journey.tokens) > len(output.new_token_ids):
            figures.later(output)
            return
        prefilled = figures.first(output, journey.leg, journey.accepted_at, journey.has_fetched)
        looked_up = prefilled is not None and figures.looks_up(journey.request, self._caching)
        if prefilled is not None and looked_up and journey.warm is None:
            self._prefilled.append(prefilled)


def _to(command: Command) -> str | None:
    """The instance that a decision sends a request to."""
    match command:
        case Prefill(on=name) | Decode(on=name) | Flow(to=name) | Ahead(to=name):
            return name
    return None
