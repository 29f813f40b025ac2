"""A request's journey between real engines, without I/O: facts in, acts out.

`STAGES` (stage.py) is the whole of it, and what is not in that table raises. Between two stages there
is nothing that could be forgotten: a leg that runs, KV that is held, and KV on its way (passage.py) each
belong to exactly one stage, and whoever leaves the stage gives them back or hands them on.

    WAITING -- Prefill --> PREFILLING -- first token --> DECODING -- Flow --> LEAVING
       |                       | it left                                         | it left
       +-- Decode, Flow -->    v                                                 v
           PREFILLING         HELD  (goes on at once where it is known where to)
                               | Decode
                               v
                            LANDING -- first token --> DECODING
                               +------ KV did not come --> PREFILLING, on the same instance

The loss of its instance makes it WAITING from everywhere; every stage can end.
"""

from __future__ import annotations

from taichi_serve.cluster.vllm.server.acts import (
    ANY,
    Acts,
    Copy,
    Finish,
    Forget,
    Leave,
    Pin,
    Place,
    PutOff,
    Refuse,
    Seat,
    Send,
    Settle,
)
from taichi_serve.cluster.vllm.server.fetching import Fetching, Prefix
from taichi_serve.cluster.vllm.server.itinerary import ROOM, RUNNING, Going, Held
from taichi_serve.cluster.vllm.server.passage import Passage, Passing
from taichi_serve.cluster.vllm.wire import TransferParams
from taichi_serve.messages import Outcome
from taichi_serve.stage import Stage


class Journey(Fetching):
    """One request that was accepted and is not over. Every method answers with acts, in order; what is not in
    the table raises TransitionError."""

    # ------------------------------------------------------------------------------------------ decisions

    def prefill(
        self, leg: int, seat: Seat, hand_over: bool, prefix: Prefix | None = None, place: Place = ANY
    ) -> Acts:
        """Compute the prompt, and the tokens so far, on this instance, in its `place` among others: for the
        first time, or elsewhere than it was to be because that instance is silent, lost or behind. A `prefix`
        is fetched before."""
        self._must("Prefill", Stage.WAITING, Stage.PREFILLING, Stage.DECODING, Stage.HELD)
        if self.tokens and not self.movable and self.seat is not None:
            return []  # it has begun meanwhile, and could not go on exactly anywhere else
        self.place = place
        acts = self._vacate()
        return acts + self._prompt(leg, seat, hand_over, prefix)

    def demote(self, leg: int, by: float) -> Acts:
        """It is best effort from now on; while it waits to be computed it takes this place."""
        self.place = Place(by, best_effort=True)
        if self.stage is not Stage.PREFILLING or leg != self.leg or not self.here.alive:
            return []
        return [PutOff(self.here, self.leg_id, by)]

    def hint(self, seat: Seat) -> Acts:
        """Its decode will most likely be there: what is computed may be copied there already."""
        if self.stage is not Stage.PREFILLING or self.promise is None or not seat.alive or seat is self.seat:
            return []
        promise, offered = self.promise, self.offered
        self.promise = self.offered = None
        self.passage = Passage(self.id, promise, self.here, self.leg_id, seat)
        return self._have(offered) if offered else []

    def flow(self, leg: int, to: Seat) -> Acts:
        """Go there while it runs; where its instance was lost meanwhile, from its tokens."""
        self._must("Flow", Stage.DECODING, Stage.WAITING)
        if self.stage is Stage.WAITING:
            return self._begin(leg, to)
        if not to.alive:
            return []  # the loss brings another decision
        if to is self.seat:
            return [Refuse(leg, "it runs there")]
        self._enter(Stage.LEAVING)
        self.going, self.told = Going(leg, to), False
        self.passage = Passage(self.id, self._fresh(), self.here, self.leg_id, to)
        return [Pin(self.passage), self._await()]

    def decode(self, leg: int, on: Seat) -> Acts:
        """Begin the next leg there, with whatever KV can be had."""
        self._must("Decode", Stage.HELD, Stage.WAITING, Stage.DECODING, Stage.LEAVING)
        if self.stage is Stage.DECODING:  # the move before was given up with its target
            return self.flow(leg, on)
        if not on.alive:
            return []
        if self.stage is Stage.LEAVING:
            return self._redirect(Going(leg, on))
        if self.stage is Stage.WAITING:
            return self._begin(leg, on)
        return self._land(leg, on)

    def end(self, outcome: Outcome) -> Acts:
        """It is over, from outside: nothing of it stays anywhere."""
        acts = self._vacate()
        self._enter(Stage.OVER)
        return [*acts, Finish(outcome)]

    # ----------------------------------------------------------------------------- what the engines say

    def first_token(self) -> Acts:
        """The first token of this leg is out."""
        self._must("a first token", Stage.PREFILLING, Stage.LANDING)
        acts = self._begun()
        if self.stage is Stage.LANDING and self.passage is not None:
            acts += self.passage.close()
            self.passage = None
        self._enter(Stage.DECODING)
        return [Settle(self.here, self.leg_id), *acts]

    def left(self, params: TransferParams | None) -> Acts:
        """Its leg is over because it goes on elsewhere; its KV is held, where there are `params`."""
        self._must("it left", Stage.DECODING, Stage.LEAVING)
        acts: Acts = [Forget(self.here, self.leg_id), *self._break_promise()]
        if self.stage is Stage.DECODING:  # after its first token, as its leg was marked
            self._enter(Stage.LEAVING)
        self._enter(Stage.HELD)
        if params is not None:
            self.held = Held(self.here, self.leg_id, params)
        self.seat, going, self.going = None, self.going, None
        return acts + (self._land(going.leg, going.to) if going is not None else [])

    def finished(self, outcome: Outcome) -> Acts:
        """Its last token is out, or its engine gave it up."""
        self._must("it finished", *RUNNING)
        acts: Acts = [Forget(self.here, self.leg_id), *self._break_promise()]
        self.seat = None
        acts += self._drop_all()
        self._enter(Stage.OVER)
        return [*acts, Finish(outcome, said=True)]

    def unread(self) -> Acts:
        """Its engine could not read its KV, or what it shares with another, and has ended the leg."""
        self._must("its KV was not read", *RUNNING)
        acts: Acts = []
        if self.stage is Stage.LEAVING:
            if self.going is not None:
                acts = [Refuse(self.going.leg, "its KV was not read")]
            self._enter(Stage.DECODING)
        return acts + self._again()

    def news(self, blocks: list[int]) -> Acts:
        """Its prefill has computed so much, which is pinned for the promised reader."""
        if self.passage is not None:
            return self._have(blocks)
        if self.promise is not None:
            self.offered = blocks
        return []

    def lost(self, seat: Seat) -> Acts:
        """An instance is gone."""
        acts: Acts = []
        passage = self.passage
        if passage is not None and passage.suffers(seat):
            acts += self._drop_passage()
        if self.fetch is not None and seat is self.fetch.source:
            acts += self._go_without()
        if self.going is not None and self.going.to is seat:
            self.going = None  # the loss brings another decision
        if self.stage is Stage.HELD and self.held is not None and self.held.seat is seat:
            self.held = None
            self._enter(Stage.WAITING)
        elif self.seat is seat:
            acts += self._strand()
        elif self.stage is Stage.LEAVING and self.going is None and not self.told:
            self._enter(Stage.DECODING)
        return acts

    # ------------------------------------------------------------------- what is said of KV on its way

    def pinned(self, passage: Passage, blocks: list[int] | None) -> Acts:
        """The source's answer to Pin: the full blocks; None where it cannot be copied so."""
        if passage is not self.passage or passage.passing is not Passing.ASKED:
            return []
        return self._have(blocks) if blocks is not None else self._plainly()

    def copied(self, passage: Passage) -> Acts:
        """The target has all that is full."""
        if passage is not self.passage or passage.passing is not Passing.COPYING:
            return []
        passage.enter(Passing.READY)
        return self._tell_to_leave() if self.stage is Stage.LEAVING and not self.told else []

    def landed(self, passage: Passage) -> Acts:
        """The target has the last block."""
        if passage is self.fetch:
            return self._fetched(passage)
        if passage is not self.passage or passage.passing is not Passing.TAIL or self._direct(passage):
            return []
        return [self._arrive(passage)]

    def failed(self, passage: Passage, why: str) -> Acts:
        """The KV cannot be had this way."""
        if passage is self.fetch:
            return self._go_without()
        if passage is not self.passage:
            return []
        if passage.landing:
            return self._again()
        return self._stay(why) if self.stage is Stage.LEAVING and not self.told else self._drop_passage()

    def late(self, mark: int) -> Acts:
        """The patience with a move is over."""
        if mark != self.mark:
            return []
        if self.fetch is not None:
            return self._go_without()
        if self.stage is Stage.LANDING:
            return self._again()
        if self.stage is not Stage.LEAVING or self.told or self.going is None:
            return []
        return self._stay(f"{self.going.to.name} did not get its KV within {self.road.patience:g} s")

    # --------------------------------------------------------------------------------- while it still runs

    def _have(self, blocks: list[int]) -> Acts:
        """These are full and pinned: the target is to copy what it does not have of them."""
        passage = self.passage
        assert passage is not None
        acts: Acts = []
        if passage.passing is Passing.ASKED:
            room = passage.target.max_model_len - self.prompt_tokens - len(self.tokens)
            if room < 1:
                return self._plainly()
            passage.room, passage.known = min(ROOM, room), len(self.tokens)
            passage.enter(Passing.COPYING)
            acts = [Send(passage, room=passage.room)]
        if passage.passing not in (Passing.COPYING, Passing.READY):
            return []
        return [*acts, Copy(passage, blocks)]

    def _plainly(self) -> Acts:
        """Let it move as if nothing had been tried."""
        acts = self._drop_passage()
        return acts + (self._tell_to_leave() if self.stage is Stage.LEAVING and not self.told else [])

    def _tell_to_leave(self) -> Acts:
        self.told = True
        return [Leave(self.here, self.leg_id)]

    def _stay(self, why: str) -> Acts:
        """The move does not happen; the request goes on where it is."""
        acts = self._drop_passage()
        assert self.going is not None
        leg, self.going = self.going.leg, None
        self._enter(Stage.DECODING)
        return [*acts, Refuse(leg, why)]

    def _redirect(self, going: Going) -> Acts:
        """It is on its way out, and is to go elsewhere than it was."""
        acts = self._drop_passage()
        self.going = going
        return acts if self.told else acts + self._tell_to_leave()
