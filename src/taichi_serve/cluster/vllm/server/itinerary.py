"""The state of a journey, and the ways from one leg to the next.

journey.py has the facts and decisions that lead to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from taichi_serve.cluster.vllm.server.acts import (
    ANY,
    Act,
    Acts,
    Add,
    Adopt,
    Arrive,
    Await,
    Copy,
    End,
    Finish,
    Forget,
    Place,
    Release,
    Seat,
    Send,
)
from taichi_serve.cluster.vllm.server.passage import Passage, Passing, Times
from taichi_serve.cluster.vllm.wire import TransferParams
from taichi_serve.messages import Outcome
from taichi_serve.stage import Stage, TransitionError, step

# Tokens that a target keeps room for beyond those it knows of: what the request makes until it leaves. Fewer
# where the model's context ends before.
ROOM = 32

RUNNING = (Stage.PREFILLING, Stage.DECODING, Stage.LEAVING, Stage.LANDING)  # a leg is at an engine


@dataclass(frozen=True, slots=True)
class Held:
    """KV that is held at the instance that a request left."""

    seat: Seat
    leg: str
    params: TransferParams


@dataclass(frozen=True, slots=True)
class Going:
    """A decided move that has not been made."""

    leg: int
    to: Seat


@dataclass(slots=True)
class Road:
    """What every journey of a cluster shares: whether one instance reads another's memory itself."""

    direct: Callable[[Seat, Seat], bool] = lambda source, target: False
    patience: float = 10.0  # seconds, for the words of a refusal


@dataclass(slots=True, eq=False)
class Itinerary:
    """Where one request is, and what it holds where. Every method answers with acts, in order."""

    id: str
    prompt_tokens: int
    movable: bool
    road: Road
    request: Any = None  # as the front end made it
    last_at: float = 0.0  # when its last token came
    accepted_at: float = 0.0
    left_at: float = 0.0  # when the engine before had made its last token
    warm: Any = None  # the future of a rehearsal: no user gets its tokens
    stage: Stage = Stage.WAITING
    tokens: list[int] = field(default_factory=list)  # output so far
    leg: int = 0  # by the scheduler's count
    legs: int = 0  # engine requests so far: each has an id of its own, or it would meet its own old blocks
    seat: Seat | None = None  # where its leg runs
    fetched: str = ""  # the leg whose prefix came from another instance
    fetch_times: Times | None = None  # of copying it
    leg_id: str = ""
    placed: bool = (
        True  # whether the leg was begun as a prompt: its first token is a Prefilled, else a Flowed
    )
    mark: int = 0  # of the last Await
    going: Going | None = None
    told: bool = False  # LEAVING: the source has been told to let it go
    held: Held | None = None
    passage: Passage | None = None  # of the next leg; when LANDING, of this one
    fetch: Passage | None = None  # of a prefix on its way to the leg that runs
    place: Place = ANY  # among those that wait where it is
    hand_over: bool = False  # the leg ends after its first token
    promise: str | None = None  # the reader that the leg pins for unasked
    offered: list[int] | None = None  # what it has pinned for it

    # --------------------------------------------------------------------------------------- small things

    def _enter(self, stage: Stage) -> None:
        """The one writer of `stage`."""
        self.stage = step(self.id, self.stage, stage)

    def _await(self) -> Await:
        self.mark += 1
        return Await(self.mark)

    def _must(self, what: str, *stages: Stage) -> None:
        if self.stage not in stages:
            raise TransitionError(f"request {self.id}: {what} while it is {self.stage.value}")

    def _fresh(self) -> str:
        """The id of an engine request that never was."""
        number, self.legs = self.legs, self.legs + 1
        return f"{self.id}#{number}" if number else self.id

    def meets(self, seat: Seat) -> bool:
        """Whether it is there, or was about to be."""
        return seat is self.seat or (self.going is not None and self.going.to is seat)

    @property
    def here(self) -> Seat:
        """Where its leg runs."""
        assert self.seat is not None
        return self.seat

    # ------------------------------------------------------------------------------------ from leg to leg

    def _begin(
        self,
        leg: int,
        seat: Seat,
        hand_over: bool = False,
        placed: bool = False,
        again: bool = False,
        fetch: int = 0,
    ) -> Acts:
        """A leg that computes the prompt and the tokens so far."""
        if self.tokens and not self.movable:  # its instance is gone, and no other could go on exactly
            self._enter(Stage.OVER)
            return [Finish(Outcome.FAILED)]
        if not seat.alive:
            if self.stage is not Stage.WAITING:
                self._enter(Stage.WAITING)
            return []  # the loss brings another decision
        self._enter(Stage.PREFILLING)
        self.leg, self.seat, self.leg_id, self.placed = leg, seat, self._fresh(), placed
        self.going, self.told, self.offered = None, False, None
        self.hand_over = hand_over and not self.tokens
        self.promise = self._fresh() if self.hand_over else None
        return [Add(seat, self.leg_id, reader=self.promise, again=again, fetch=fetch)]

    def _land(self, leg: int, on: Seat) -> Acts:
        """Its KV is held: begin the next leg with it, if it can be had there."""
        held, self.held = self.held, None
        if held is None:
            return [*self._drop_passage(), *self._begin(leg, on)]
        passage = self.passage
        if passage is not None and passage.target is on and passage.ready and self._fits(passage, held):
            return self._tail(leg, passage, held)
        acts = self._drop_passage()
        if held.seat is on or not (held.seat.alive and on.alive):
            # Back on the same instance, its prefix cache still has the blocks.
            acts += [Release(held.seat, held.leg, None)] if held.seat.alive else []
            return acts + self._begin(leg, on)
        self._enter(Stage.LANDING)
        passage = self.passage = Passage(self.id, self._fresh(), held.seat, held.leg, on, Passing.PULLING)
        self.leg, self.seat, self.leg_id, self.placed = leg, on, passage.reader, False
        return [*acts, Send(passage, kv=held.params), self._await()]

    def _fits(self, passage: Passage, held: Held) -> bool:
        kept = self.prompt_tokens + passage.known + passage.room
        return bool(held.params["remote_num_tokens"] < kept)

    def _tail(self, leg: int, passage: Passage, held: Held) -> Acts:
        self._enter(Stage.LANDING)
        passage.enter(Passing.TAIL)
        passage.owns = True
        self.leg, self.seat, self.leg_id, self.placed = leg, passage.target, passage.reader, False
        blocks = list(held.params["remote_block_ids"][0])
        copy = Copy(passage, blocks, held.params["remote_request_id"])
        # Read directly, the tail is there before the step that needs it.
        first: Acts = [self._arrive(passage)] if self._direct(passage) else []
        return [Adopt(passage.target, passage.reader), *first, copy, self._await()]

    def _arrive(self, passage: Passage) -> Act:
        return Arrive(passage, self.tokens[passage.known :])

    def _direct(self, passage: Passage) -> bool:
        return self.road.direct(passage.source, passage.target)

    def _again(self) -> Acts:
        """Its KV did not come, or not in time: compute the tokens so far again, on the same instance."""
        seat, leg = self.here, self.leg
        acts: Acts = [Forget(seat, self.leg_id), *self._break_promise(), *self._drop_all()]
        return acts + self._begin(leg, seat, placed=self.placed and not self.tokens, again=True)

    # ------------------------------------------------------------------------------------------ giving back

    def _vacate(self) -> Acts:
        """Whatever runs ends, and whatever is held is given back."""
        acts: Acts = []
        if self.seat is not None:
            landing = self.passage is not None and self.passage.landing
            fetching = self.fetch is not None and self.fetch.passing is Passing.COPYING
            acts.append((Forget if landing or fetching else End)(self.seat, self.leg_id))
        acts += [*self._break_promise(), *self._drop_all()]
        if self.held is not None and self.held.seat.alive:
            acts.append(Release(self.held.seat, self.held.leg, None))
        self.seat = self.held = self.going = None
        return acts

    def _strand(self) -> Acts:
        """Its instance is gone. Whoever was on the way out goes on where it was to go, from its tokens."""
        going, self.going = self.going, None
        acts = self._drop_all()
        self.seat = self.promise = self.offered = None
        if self.tokens and not self.movable:  # no other could go on exactly
            self._enter(Stage.OVER)
            return [*acts, Finish(Outcome.FAILED)]
        self._enter(Stage.WAITING)
        return acts + (self._begin(going.leg, going.to) if going is not None else [])

    def _break_promise(self) -> Acts:
        promise, self.promise = self.promise, None
        offered, self.offered = self.offered, None
        return [Release(self.here, None, promise)] if promise is not None and offered is not None else []

    def _drop_passage(self) -> Acts:
        passage, self.passage = self.passage, None
        return passage.drop() if passage is not None else []

    def _drop_all(self) -> Acts:
        """The leg that runs is over: what was on its way to the next one, and what it was to fetch."""
        fetch, self.fetch = self.fetch, None
        return [*self._drop_passage(), *(fetch.drop() if fetch is not None else [])]
