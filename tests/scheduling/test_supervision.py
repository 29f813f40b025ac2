"""An instance falls silent, is lost, and comes back: who goes where meanwhile."""

from __future__ import annotations

import pytest

from taichi_serve.latency.predict import Learned
from taichi_serve.messages import (
    Abort,
    Arrived,
    Asked,
    Cancelled,
    Command,
    Decode,
    Drained,
    Finished,
    Flow,
    Flowed,
    Hopeless,
    Joined,
    Lost,
    Move,
    Outcome,
    Prefill,
    Prefilled,
    Refused,
    SetChunk,
    Silent,
    Slid,
    Stepped,
)
from taichi_serve.request import State
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

ALONE = Sliders(p_heavy=0, d_heavy=1, p_chunk=0, d_chunk=256)
TWINS = Sliders(p_heavy=0, d_heavy=2, p_chunk=0, d_chunk=256)
DISAGGREGATION = Sliders(p_heavy=1, d_heavy=1, p_chunk=2048, d_chunk=0)


def scheduler(sliders: Sliders, capacity: int = 10_000) -> GlobalScheduler:
    capacities = {f"i{n}": capacity for n in range(sliders.instances)}
    return GlobalScheduler(sliders, SLO(4.0, 0.1), Learned(), Policy(dwell=0.0), capacities)


def placed(commands: list[Command]) -> list[tuple[str, int, str]]:
    """Prompts that were placed: request, leg, instance."""
    return [(c.request, c.leg, c.on) for c in commands if isinstance(c, Prefill)]


def rescued(commands: list[Command]) -> list[tuple[str, int, str]]:
    return [(c.request, c.leg, c.on) for c in commands if isinstance(c, Decode) and c.move is Move.RESCUE]


def assert_empty(s: GlobalScheduler) -> None:
    assert not s.requests
    for i in s.instances.values():
        assert (i.decodes, i.arriving, i.queued_tokens, i.queued_requests) == (0, 0, 0, 0)
        assert (i.progress_tokens, i.reserved_tokens, i.leaving_tokens, i.context_base) == (0, 0, 0, 0)


# ----------------------------------------------------------------------------------- the last one is lost


def alone_with_a_prompt_and_a_decode() -> GlobalScheduler:
    s = scheduler(ALONE)
    s.on(Arrived(0.0, "prompt", 500, 100))
    s.on(Arrived(0.0, "decode", 500, 100))
    s.on(Arrived(0.0, "bound", 500, 100, movable=False, bound_by="seed"))
    for name in ("decode", "bound"):
        s.on(Prefilled(0.1, name, 0, "i0"))
    return s


def test_with_the_last_instance_lost_requests_wait_but_for_who_has_begun_and_cannot_move() -> None:
    s = alone_with_a_prompt_and_a_decode()
    (abort,) = s.on(Lost(0.2, "i0", "killed"))
    assert isinstance(abort, Abort)
    assert (abort.request, abort.outcome) == ("bound", Outcome.FAILED)
    assert s.on(Arrived(0.3, "late", 100, 100)) == []
    assert {name: r.state for name, r in s.requests.items()} == dict.fromkeys(
        ("prompt", "decode", "late"), State.WAITING
    )


def test_who_waited_is_placed_in_order_of_arrival_when_an_instance_joins() -> None:
    s = alone_with_a_prompt_and_a_decode()
    s.on(Stepped(0.15, "i0", 0.02, 0, 1, 1_200))
    s.on(Lost(0.2, "i0", "killed"))
    s.on(Arrived(0.3, "late", 100, 100))
    chunk, first, second, third = s.on(Joined(9.0, "i0", 8_000))
    assert chunk == SetChunk("i0", Kind.D_HEAVY, 256)
    assert placed([first, third]) == [("prompt", 1, "i0"), ("late", 0, "i0")]
    assert rescued([second]) == [("decode", 1, "i0")]
    here = s.instances["i0"]
    assert (here.alive, here.kv_capacity, here.kv_tokens, here.arriving, here.queued_requests) == (
        True, 8_000, 0, 1, 2,
    )  # fmt: skip
    s.on(Prefilled(9.1, "prompt", 0, "i0"))  # late: that leg ended with the instance
    assert s.requests["prompt"].state is State.PREFILLING
    s.on(Flowed(9.2, "decode", 1, "i0", 3, 0, 9.0))
    for name in ("prompt", "decode", "late"):
        s.on(Finished(10.0, name, 100))
    assert_empty(s)


def test_when_nothing_will_come_back_those_who_wait_are_failed() -> None:
    s = alone_with_a_prompt_and_a_decode()
    s.on(Lost(0.2, "i0", "killed"))
    sent = s.on(Hopeless(60.0, "i0 died five times in an hour"))
    assert sent == [
        Abort(name, Outcome.FAILED, "i0 died five times in an hour") for name in ("prompt", "decode")
    ]
    assert s.counters.outcomes[Outcome.FAILED] == 3
    assert_empty(s)


def test_who_comes_when_nothing_will_come_back_does_not_wait_for_it() -> None:
    s = alone_with_a_prompt_and_a_decode()
    s.on(Lost(0.2, "i0", "killed"))
    s.on(Hopeless(60.0, "it died five times"))
    assert s.on(Arrived(61.0, "a", 100, 100)) == [Abort("a", Outcome.FAILED, "it died five times")]
    assert_empty(s)
    s.on(Joined(70.0, "i0", 8_000))  # somebody brought it back all the same
    assert placed(s.on(Arrived(71.0, "b", 100, 100))) == [("b", 0, "i0")]


def test_hopeless_while_somebody_lives_fails_nobody() -> None:
    s = scheduler(TWINS)
    s.on(Arrived(0.0, "a", 100, 100))
    s.on(Lost(0.1, "i1", "killed"))
    assert s.on(Hopeless(60.0, "i1 died five times in an hour")) == []
    assert placed(s.on(Arrived(61.0, "b", 100, 100))) == [("b", 0, "i0")]


def test_a_client_may_leave_while_its_request_waits() -> None:
    s = alone_with_a_prompt_and_a_decode()
    s.on(Lost(0.2, "i0", "killed"))
    for name in ("prompt", "decode"):
        assert s.on(Cancelled(0.3, name)) == [Abort(name, Outcome.CANCELLED, "the client left")]
    assert_empty(s)


def test_a_request_on_its_way_waits_too_when_its_target_is_the_last_one_lost() -> None:
    s = scheduler(TWINS)
    s.on(Arrived(0.0, "a", 500, 100))
    s.on(Prefilled(0.1, "a", 0, "i0"))
    s.on(Asked(0.2, "a", "i1"))
    assert s.on(Lost(0.3, "i0", "killed")) == []  # it goes on at i1
    assert s.on(Lost(0.4, "i1", "killed")) == []
    assert s.requests["a"].state is State.WAITING
    sent = s.on(Joined(1.0, "i0", 10_000))
    assert rescued(sent) == [("a", 2, "i0")]
    s.on(Finished(2.0, "a", 100))
    assert_empty(s)


# ----------------------------------------------------------------------------------------- one comes back


def test_who_became_p_heavy_for_a_lost_one_goes_back_when_it_joins_and_its_prompts_are_through() -> None:
    s = scheduler(DISAGGREGATION)
    s.on(Arrived(0.0, "a", 100, 50))
    assert s.on(Lost(0.1, "i0", "killed"))[0] == SetChunk("i1", Kind.P_HEAVY, 2048)
    assert s.on(Joined(9.0, "i0", 10_000)) == [
        SetChunk("i0", Kind.P_HEAVY, 2048),
        SetChunk("i1", Kind.D_HEAVY, 2048),  # 0 would starve the prompt that is queued there
    ]
    assert placed(s.on(Arrived(9.1, "b", 100, 50))) == [("b", 0, "i0")]
    assert s.on(Prefilled(9.2, "a", 1, "i1")) == [SetChunk("i1", Kind.D_HEAVY, 0)]


def test_who_became_p_heavy_stays_so_while_no_other_takes_prompts() -> None:
    s = scheduler(Sliders(p_heavy=1, d_heavy=2, p_chunk=2048, d_chunk=0))
    s.on(Lost(0.1, "i0", "killed"))
    s.on(Lost(0.1, "i2", "killed"))
    assert s.on(Arrived(0.2, "a", 100, 50))[0] == SetChunk("i1", Kind.P_HEAVY, 2048)
    assert s.on(Joined(9.0, "i2", 10_000)) == [SetChunk("i2", Kind.D_HEAVY, 0)]
    assert (s.instances["i1"].kind, s.instances["i1"].chunk) == (Kind.P_HEAVY, 2048)


def test_who_joins_is_what_the_sliders_say_by_now() -> None:
    s = scheduler(TWINS)
    s.on(Lost(0.1, "i0", "killed"))
    s.on(Slid(0.2, Sliders(p_heavy=1, d_heavy=1, p_chunk=512, d_chunk=64)))
    assert s.on(Joined(9.0, "i0", 10_000)) == [SetChunk("i0", Kind.P_HEAVY, 512)]


def test_who_joins_is_still_drained_if_it_was() -> None:
    s = scheduler(TWINS)
    s.on(Drained(0.0, "i0"))
    s.on(Lost(0.1, "i0", "killed"))
    s.on(Joined(9.0, "i0", 10_000))
    assert placed(s.on(Arrived(9.1, "a", 100, 50))) == [("a", 0, "i1")]


def test_who_never_was_lost_cannot_join() -> None:
    s = scheduler(TWINS)
    s.on(Arrived(0.0, "a", 100, 50))
    assert s.on(Joined(9.0, "i0", 10_000)) == []
    assert s.on(Joined(9.0, "i7", 10_000)) == []


def test_who_joins_without_any_kv_is_an_error_with_its_name() -> None:
    s = scheduler(TWINS)
    s.on(Lost(0.1, "i1", "killed"))
    with pytest.raises(ValueError, match="i1 came back with a KV capacity of 0 tokens"):
        s.on(Joined(9.0, "i1", 0))


# ---------------------------------------------------------------------------------------- one is silent


def silent_with_a_prompt_and_a_decode(sliders: Sliders = TWINS) -> tuple[GlobalScheduler, list[Command]]:
    """i0 has the prompt "a" queued and decodes "b"; then it does not answer."""
    s = scheduler(sliders)
    s.on(Arrived(0.0, "b", 400, 100))
    s.on(Prefilled(0.1, "b", 0, "i0"))
    s.on(Arrived(0.1, "a", 500, 100))
    assert s.requests["a"].instance == "i0"
    return s, s.on(Silent(5.0, "i0"))


def test_the_queued_prompts_of_a_silent_instance_go_elsewhere_and_its_decodes_stay() -> None:
    s, sent = silent_with_a_prompt_and_a_decode()
    assert placed(sent) == [("a", 1, "i1")]
    assert len(sent) == 1
    assert (s.requests["b"].state, s.requests["b"].instance) == (State.DECODING, "i0")
    s.on(Prefilled(5.1, "a", 0, "i0"))  # late: that leg is over
    assert s.requests["a"].state is State.PREFILLING
    for name in ("a", "b"):
        s.on(Finished(6.0, name, 100))
    assert_empty(s)


def test_a_silent_instance_gets_nothing_new_until_it_is_heard_again() -> None:
    s, _ = silent_with_a_prompt_and_a_decode()
    assert placed(s.on(Arrived(5.1, "c", 100, 50))) == [("c", 0, "i1")]
    s.on(Prefilled(5.2, "c", 0, "i1"))
    assert s.on(Asked(5.3, "c", "i0")) == []
    assert s.on(Asked(5.3, "b", "i1")) == []  # nor can it be told to let somebody go
    assert s.on(Drained(5.4, "i1")) == []  # there is nobody to drain to
    assert s.on(Silent(6.0, "i0", on=False)) == []
    assert placed(s.on(Arrived(6.1, "d", 100, 50))) == [("d", 0, "i0")]
    assert [c.to for c in s.on(Stepped(6.2, "i1", 0.02, 0, 1, 100)) if isinstance(c, Flow)] == ["i0"]


def test_when_none_answers_prompts_stay_and_new_ones_go_to_whoever_lives() -> None:
    s = scheduler(ALONE)
    s.on(Arrived(0.0, "a", 100, 50))
    assert s.on(Silent(5.0, "i0")) == []
    assert placed(s.on(Arrived(5.1, "b", 100, 50))) == [("b", 0, "i0")]
    assert s.requests["a"].instance == "i0"


def test_prompts_that_stayed_go_to_the_first_one_that_answers() -> None:
    s = scheduler(TWINS)
    s.on(Silent(1.0, "i1"))
    s.on(Silent(1.0, "i0"))
    assert placed(s.on(Arrived(1.1, "a", 100, 50))) == [("a", 0, "i0")]
    assert placed(s.on(Silent(2.0, "i1", on=False))) == [("a", 1, "i1")]
    s.on(Lost(3.0, "i1", "killed"))
    assert s.requests["a"].instance == "i0"  # the one that lives, silent or not
    assert placed(s.on(Joined(4.0, "i1", 10_000))) == [("a", 3, "i1")]


def test_the_only_one_who_prefills_is_silent_and_another_takes_its_place_until_it_answers() -> None:
    s = scheduler(DISAGGREGATION)
    s.on(Arrived(0.0, "a", 100, 50))
    chunk, prefill = s.on(Silent(5.0, "i0"))
    assert chunk == SetChunk("i1", Kind.P_HEAVY, 2048)
    assert placed([prefill]) == [("a", 1, "i1")]
    s.on(Prefilled(5.5, "a", 1, "i1"))
    assert s.on(Silent(6.0, "i0", on=False)) == [SetChunk("i1", Kind.D_HEAVY, 0)]


def test_an_instance_that_was_closing_gets_chunk_zero_when_its_prompts_were_taken_away() -> None:
    s = scheduler(Sliders(p_heavy=1, d_heavy=1, p_chunk=1024, d_chunk=256))
    s.on(Arrived(0.0, "a", 100, 50))
    assert s.requests["a"].instance == "i1"
    assert s.on(Slid(0.1, Sliders(p_heavy=1, d_heavy=1, p_chunk=1024, d_chunk=0))) == []
    prefill, chunk = s.on(Silent(5.0, "i1"))
    assert placed([prefill]) == [("a", 1, "i0")]
    assert chunk == SetChunk("i1", Kind.D_HEAVY, 0)


def test_a_silent_instance_that_is_lost_is_lost_like_any_other() -> None:
    s, _ = silent_with_a_prompt_and_a_decode()
    assert rescued(s.on(Lost(9.0, "i0", "killed"))) == [("b", 1, "i1")]
    assert s.on(Silent(9.1, "i0", on=False)) == []  # late
    s.on(Joined(20.0, "i0", 10_000))
    assert s.instances["i0"].serving


def test_a_prompt_that_was_not_taken_in_is_placed_anew() -> None:
    s = scheduler(TWINS)
    s.on(Arrived(0.0, "a", 100, 50))
    assert placed(s.on(Refused(0.1, "a", 0, "i0 is lost"))) == [("a", 1, "i0")]
    assert s.instances["i0"].queued_requests == 1
    assert s.on(Refused(0.2, "a", 0, "late")) == []
