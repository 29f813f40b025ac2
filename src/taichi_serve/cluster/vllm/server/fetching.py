"""A prompt whose prefix another instance has in its prefix cache: how a journey fetches it.

    holder                          server                           target
                                    Prefill        ASKED    -- Add ------------>  it waits in the queue
    pins what it has       <------  Find
    blocks                 ------>  found          COPYING  -- Copy (whole) --->  copies when it is near
    lets go                <------  landed         CLOSED   <- Copied ---------
                                                            -- Fetched -------->  computes the rest

The passage leads to the leg that runs already, so the request is PREFILLING all the time. Whatever goes wrong
costs the fetch alone: the leg is computed without it, in its place of the queue where nothing was given to it
yet, else as a new leg, whose blocks nobody writes into.
"""

from __future__ import annotations

from dataclasses import dataclass

from taichi_serve.cluster.vllm.server.acts import Acts, Copy, Fetched, Find, Forget, Seat, Uncopy, Waive
from taichi_serve.cluster.vllm.server.itinerary import Itinerary
from taichi_serve.cluster.vllm.server.passage import Passage, Passing
from taichi_serve.stage import Stage


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first `blocks` blocks of a prompt, which this instance is believed to have."""

    seat: Seat
    blocks: int


class Fetching(Itinerary):
    """What is decided and said about a fetch."""

    def _prompt(self, leg: int, seat: Seat, hand_over: bool, prefix: Prefix | None) -> Acts:
        """A leg that computes the prompt, all of it or what is behind the prefix."""
        if prefix is None or self.tokens or not prefix.seat.alive or prefix.seat is seat:
            return self._begin(leg, seat, hand_over, placed=True)
        acts = self._begin(leg, seat, hand_over, placed=True, fetch=prefix.blocks)
        if self.stage is not Stage.PREFILLING:
            return acts
        self.fetch = Passage(self.id, self.leg_id, prefix.seat, "", seat)
        return [*acts, Find(self.fetch, prefix.blocks), self._await()]

    def found(self, passage: Passage, blocks: list[int]) -> Acts:
        """The holder's answer to Find: what it has by now; nothing where it cannot be read."""
        if passage is not self.fetch or passage.passing is not Passing.ASKED:
            return []
        if not blocks:
            return self._go_without()
        passage.found = len(blocks)
        passage.enter(Passing.COPYING)
        return [Copy(passage, blocks, whole=True)]

    def waived(self, passage: Passage, computed: bool) -> Acts:
        """The target's answer to Waive: whether the leg is computed without the fetch."""
        if passage is not self.fetch:
            return []
        if computed:
            self.fetch = None
            return [Uncopy(passage), *passage.close()]
        acts: Acts = [Forget(self.here, self.leg_id), *self._break_promise()]
        return acts + self._drop_all() + self._begin(self.leg, self.here, self.hand_over, placed=True)

    def _fetched(self, passage: Passage) -> Acts:
        """The target has it all."""
        if passage.passing is not Passing.COPYING:
            return []
        self.fetch, self.fetched, self.fetch_times = None, self.leg_id, passage.times
        return [Fetched(passage, passage.found), *passage.close()]

    @property
    def has_fetched(self) -> bool:
        """Whether a prefix of the leg that runs came from another instance."""
        return bool(self.fetched) and self.fetched == self.leg_id

    def silent(self, seat: Seat) -> Acts:
        """An instance does not answer: what it was asked about a prefix is not waited for."""
        fetch = self.fetch
        if fetch is None or fetch.source is not seat or fetch.passing is not Passing.ASKED:
            return []
        return self._go_without()

    def _go_without(self) -> Acts:
        """It is late, its holder is lost, or it cannot be read."""
        passage = self.fetch
        assert passage is not None
        if passage.passing is not Passing.ASKED:
            return [Waive(passage)]
        self.fetch = None
        return [Fetched(passage, 0), Uncopy(passage), *passage.close()]

    def _begun(self) -> Acts:
        """The leg has made a token, so nothing is fetched for it any more: what it needed was here before."""
        passage, self.fetch = self.fetch, None
        if passage is None:
            return []
        copying = passage.passing is Passing.COPYING
        return [*([Uncopy(passage)] if copying else []), *passage.close()]
