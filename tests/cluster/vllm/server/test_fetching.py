"""How a journey fetches a prefix: facts and decisions by hand, and the acts that follow."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.server.acts import (
    Act,
    Add,
    Await,
    Close,
    Copy,
    Drop,
    End,
    Fetched,
    Find,
    Finish,
    Forget,
    Release,
    Settle,
    Uncopy,
    Waive,
)
from taichi_serve.cluster.vllm.server.fetching import Prefix
from taichi_serve.cluster.vllm.server.itinerary import Road
from taichi_serve.cluster.vllm.server.journey import Journey
from taichi_serve.cluster.vllm.server.passage import Passage, Passing
from taichi_serve.messages import Outcome
from taichi_serve.stage import Stage


@dataclass(eq=False)
class Place:
    """One incarnation of an instance."""

    name: str
    alive: bool = True
    max_model_len: int = 100

    @property
    def engine_id(self) -> str:
        return self.name


class Fetch:
    """A prompt of 40 tokens on `here`, whose first two blocks `holder` is believed to have."""

    def __init__(self, hand_over: bool = False, movable: bool = True) -> None:
        self.here, self.holder = Place("here"), Place("holder")
        self.journey = Journey("a", 40, movable, Road())
        self.acts = self.journey.prefill(0, self.here, hand_over, Prefix(self.holder, 2))
        assert self.journey.fetch is not None
        self.passage: Passage = self.journey.fetch

    def copying(self) -> Fetch:
        """The holder has both, and they are being copied."""
        assert self.journey.found(self.passage, [7, 9]) == [Copy(self.passage, [7, 9], whole=True)]
        return self

    def goes_without(self, acts: list[Act]) -> None:
        """It keeps its place in the queue, and the holder lets go."""
        assert acts == [Fetched(self.passage, 0), Uncopy(self.passage), Close(self.passage)]
        self.is_over()

    def is_over(self) -> None:
        """Nothing is fetched any more, and the request is where it was."""
        assert self.journey.fetch is None
        assert self.journey.stage is Stage.PREFILLING
        assert self.passage.passing is Passing.CLOSED


def test_a_prompt_is_sent_at_once_and_waits_in_the_queue_while_its_holder_is_asked() -> None:
    fetch = Fetch()
    assert fetch.acts == [Add(fetch.here, "a", fetch=2), Find(fetch.passage, 2), Await(1)]
    assert fetch.journey.stage is Stage.PREFILLING


def test_what_the_holder_has_is_copied_told_to_the_target_and_let_go() -> None:
    fetch = Fetch().copying()
    acts = fetch.journey.landed(fetch.passage)
    assert acts == [Fetched(fetch.passage, 2), Close(fetch.passage)]
    fetch.is_over()
    assert fetch.journey.first_token() == [Settle(fetch.here, "a")]


def test_a_prompt_has_fetched_when_its_blocks_came_from_another_instance_and_not_before() -> None:
    fetch = Fetch().copying()
    assert not fetch.journey.has_fetched
    fetch.journey.landed(fetch.passage)
    assert fetch.journey.has_fetched
    fetch.journey.lost(fetch.here)
    fetch.journey.prefill(1, fetch.holder, False)
    assert not fetch.journey.has_fetched, "another leg, which found on its own host what it did not compute"


def test_a_prompt_that_goes_without_has_not_fetched() -> None:
    fetch = Fetch()
    fetch.journey.found(fetch.passage, [])
    assert not fetch.journey.has_fetched


def test_a_holder_that_lost_a_part_of_it_gives_what_it_has() -> None:
    fetch = Fetch()
    assert fetch.journey.found(fetch.passage, [7]) == [Copy(fetch.passage, [7], whole=True)]
    assert fetch.journey.landed(fetch.passage)[0] == Fetched(fetch.passage, 1)


def test_of_a_holder_that_has_nothing_any_more_nothing_is_fetched() -> None:
    fetch = Fetch()
    fetch.goes_without(fetch.journey.found(fetch.passage, []))


def test_when_the_holder_does_not_answer_in_time_the_prompt_goes_without() -> None:
    fetch = Fetch()
    fetch.goes_without(fetch.journey.late(1))
    assert fetch.journey.found(fetch.passage, [7, 9]) == []  # its answer comes after all


def test_a_holder_that_falls_silent_before_it_answers_is_not_waited_for() -> None:
    fetch = Fetch()
    assert fetch.journey.silent(fetch.here) == []
    fetch.goes_without(fetch.journey.silent(fetch.holder))
    copying = Fetch().copying()
    assert copying.journey.silent(copying.holder) == []  # its memory is read without it


def test_when_the_holder_dies_before_it_answers_the_prompt_goes_without() -> None:
    fetch = Fetch()
    fetch.holder.alive = False
    fetch.goes_without(fetch.journey.lost(fetch.holder))


@pytest.mark.parametrize("what", ["late", "lost", "failed"])
def test_when_copying_fails_the_target_is_asked_whether_it_still_waits_in_the_queue(what: str) -> None:
    fetch = Fetch().copying()
    acts = {
        "late": lambda: fetch.journey.late(1),
        "lost": lambda: fetch.journey.lost(fetch.holder),
        "failed": lambda: fetch.journey.failed(fetch.passage, "unreadable"),
    }[what]()
    assert acts == [Waive(fetch.passage)]
    assert fetch.journey.waived(fetch.passage, True) == [Uncopy(fetch.passage), Close(fetch.passage)]
    fetch.is_over()


def test_where_blocks_were_given_already_it_begins_anew_and_nobody_lets_go_before_nothing_is_read() -> None:
    fetch = Fetch(hand_over=True).copying()
    fetch.journey.late(1)
    acts = fetch.journey.waived(fetch.passage, False)
    again = Add(fetch.here, "a#2", reader="a#3")  # without a fetch, and still to be handed over
    assert acts == [Forget(fetch.here, "a"), Drop(fetch.passage, copied=True), again]
    assert fetch.passage.passing is Passing.DROPPING
    assert fetch.journey.stage is Stage.PREFILLING
    assert fetch.journey.landed(fetch.passage) == []  # it comes after all


def test_bytes_that_are_here_before_the_target_has_answered_count() -> None:
    fetch = Fetch().copying()
    fetch.journey.late(1)
    assert fetch.journey.landed(fetch.passage)[0] == Fetched(fetch.passage, 2)
    assert fetch.journey.waived(fetch.passage, False) == []
    fetch.is_over()


def test_a_first_token_ends_a_fetch_that_was_not_needed_any_more() -> None:
    fetch = Fetch().copying()  # its own cache had both by then, and no block was given to it
    acts = fetch.journey.first_token()
    assert acts == [Settle(fetch.here, "a"), Uncopy(fetch.passage), Close(fetch.passage)]
    assert fetch.journey.stage is Stage.DECODING
    assert fetch.journey.late(1) == []
    asked = Fetch()
    assert asked.journey.first_token() == [Settle(asked.here, "a"), Close(asked.passage)]


def test_when_its_own_instance_dies_the_holder_lets_go_and_the_prompt_waits_for_another() -> None:
    for fetch in (Fetch(), Fetch().copying()):
        fetch.here.alive = False
        assert fetch.journey.lost(fetch.here) == [Close(fetch.passage)]
        assert fetch.journey.stage is Stage.WAITING


def test_a_prompt_that_is_placed_elsewhere_meanwhile_leaves_nothing_behind() -> None:
    elsewhere = Place("elsewhere")
    fetch = Fetch()
    acts = fetch.journey.prefill(1, elsewhere, False)
    assert acts == [End(fetch.here, "a"), Close(fetch.passage), Add(elsewhere, "a#1")]
    fetch = Fetch().copying()
    acts = fetch.journey.prefill(1, elsewhere, False)
    assert acts == [Forget(fetch.here, "a"), Drop(fetch.passage, copied=True), Add(elsewhere, "a#1")]


def test_a_client_that_leaves_ends_the_fetch() -> None:
    fetch = Fetch()
    cancelled = Finish(Outcome.CANCELLED)
    acts = fetch.journey.end(Outcome.CANCELLED)
    assert acts == [End(fetch.here, "a"), Close(fetch.passage), cancelled]
    fetch = Fetch().copying()
    acts = fetch.journey.end(Outcome.CANCELLED)
    assert acts == [Forget(fetch.here, "a"), Drop(fetch.passage, copied=True), cancelled]


def test_a_prefill_that_is_handed_over_fetches_first_and_is_copied_ahead_then() -> None:
    fetch, to = Fetch(hand_over=True), Place("to")
    assert fetch.acts[0] == Add(fetch.here, "a", reader="a#1", fetch=2)
    fetch.copying().journey.landed(fetch.passage)
    assert fetch.journey.news([3, 4]) == []
    fetch.journey.hint(to)
    ahead = fetch.journey.passage
    assert ahead is not None
    assert (ahead.reader, ahead.source, ahead.target) == ("a#1", fetch.here, to)


def test_what_is_told_of_a_followed_prefill_is_not_taken_for_its_fetch() -> None:
    fetch = Fetch(hand_over=True).copying()
    assert fetch.journey.news([3, 4]) == []
    acts = fetch.journey.end(Outcome.CANCELLED)
    assert Release(fetch.here, None, "a#1") in acts
    assert Drop(fetch.passage, copied=True) in acts


def test_a_request_that_is_bound_to_its_instance_fetches_its_prompt() -> None:
    fetch = Fetch(movable=False)
    assert fetch.acts[0] == Add(fetch.here, "a", fetch=2)


def test_nothing_is_fetched_from_itself_from_a_dead_one_or_for_tokens_that_are_out() -> None:
    here, dead = Place("here"), Place("dead", alive=False)
    for prefix in (Prefix(here, 2), Prefix(dead, 2)):
        assert Journey("a", 40, True, Road()).prefill(0, here, False, prefix) == [Add(here, "a")]
    journey = Journey("a", 40, True, Road(), tokens=[50])
    assert journey.prefill(0, here, False, Prefix(Place("holder"), 2)) == [Add(here, "a")]


def test_nothing_is_fetched_by_an_instance_that_is_lost_by_then() -> None:
    journey = Journey("a", 40, True, Road())
    assert journey.prefill(0, Place("here", alive=False), False, Prefix(Place("holder"), 2)) == []
    assert (journey.stage, journey.fetch) == (Stage.WAITING, None)


def test_a_holder_that_dies_while_it_is_also_to_decode_ends_both() -> None:
    fetch = Fetch(hand_over=True)
    fetch.journey.hint(fetch.holder)
    ahead = fetch.journey.passage
    assert ahead is not None
    fetch.holder.alive = False
    fetch.goes_without(fetch.journey.lost(fetch.holder)[1:])
    assert (fetch.journey.passage, ahead.passing) == (None, Passing.CLOSED)
