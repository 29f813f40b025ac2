"""Seats by hand-made numbers: an instance runs so many requests at once, and no more.

A prompt token takes 1 ms. SLO: TTFT 4 s, TPOT 100 ms; a prompt is in time where it is predicted within 95 %
of it, 3.8 s.
"""

from __future__ import annotations

import pytest
from even import Even

from taichi_serve.instance import Instance
from taichi_serve.messages import (
    Added,
    Ahead,
    Arrived,
    Command,
    Decline,
    Decode,
    Finished,
    Prefill,
    Prefilled,
    Stepped,
)
from taichi_serve.scheduling.policy import DEMOTE, REFUSE, SERVE, Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.scheduling.seats import Seats
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

TOGETHER, APART = Sliders(0, 2, 0, 100), Sliders(1, 1, 100, 0)


FILLING = Even(base=0.02, each=0.01)  # an output token takes 20 ms, and 10 ms more for each decode


def scheduler(
    sliders: Sliders, seats: int, overload: str = SERVE, watermark: float = 0.95, asked: Even | None = None
) -> GlobalScheduler:
    capacities = {f"i{n}": 1_000_000 for n in range(sliders.instances)}
    policy = Policy(overload=overload, watermark=watermark, dwell=0.0)
    return GlobalScheduler(sliders, SLO(4.0, 0.1), asked or Even(), policy, capacities, seats=seats)


def here(kind: Kind, **figures: int) -> Instance:
    return Instance("i0", kind, 256, 1_000_000, 10, **figures)


def arrive(s: GlobalScheduler, at: float = 0.0, **prompts: int) -> list[Command]:
    """These come, one after the other; the commands."""
    return [command for name, tokens in prompts.items() for command in s.on(Arrived(at, name, tokens, 100))]


def decoding(s: GlobalScheduler, name: str, prompt: int = 100) -> None:
    """A request that decodes where it prefilled."""
    arrive(s, **{name: prompt})
    on = s.requests[name].instance
    assert on is not None
    s.on(Prefilled(0.0, name, 0, on))


def test_whoever_will_decode_on_an_instance_needs_a_seat_there() -> None:
    figures = {"decodes": 5, "arriving": 2, "queued_requests": 3}
    assert here(Kind.D_HEAVY, **figures).seats_left == 0
    assert here(Kind.P_HEAVY, **figures).seats_left == 3  # these prompts leave with their first token


def test_a_prompt_goes_where_there_is_a_seat_though_more_is_queued_there() -> None:
    s = scheduler(TOGETHER, seats=2)
    decoding(s, "a")
    s.instances["i0"].decodes = 2  # all seats
    kinds = [(c.on, c.forecasts[0].fits) for c in arrive(s, b=900, c=100) if isinstance(c, Prefill)]
    assert kinds == [("i1", False), ("i1", False)]


@pytest.mark.parametrize("watermark", [0.95, 1.0])
def test_a_decode_that_has_room_but_no_seat_waits_for_one_on_a_d_heavy_instance(watermark: float) -> None:
    s = scheduler(APART, seats=1, watermark=watermark)
    s.instances["i1"].decodes = 1
    arrive(s, a=100)
    (decode,) = s.on(Prefilled(0.1, "a", 0, "i0", held=True))
    assert isinstance(decode, Decode)
    assert (decode.on, decode.why) == ("i1", "waits for a seat: none with room has any")


def test_with_no_room_either_it_stays_where_it_prefilled() -> None:
    s = scheduler(APART, seats=1)
    s.instances["i1"].decodes, s.instances["i1"].kv_tokens = 1, 1_000_000
    arrive(s, a=100)
    (decode,) = s.on(Prefilled(0.1, "a", 0, "i0", held=True))
    assert isinstance(decode, Decode)
    assert decode.on == "i0"


@pytest.mark.parametrize(("free", "on"), [(0, "i1"), (1, "i2")])
def test_where_no_other_has_a_seat_a_decode_waits_where_its_kv_was_copied_ahead(free: int, on: str) -> None:
    policy, capacities = Policy(ahead=True), {"i0": 10_000, "i1": 10_000, "i2": 10_000}
    s = GlobalScheduler(Sliders(1, 2, 100, 0), SLO(4.0, 0.1), Even(), policy, capacities, seats=4)
    arrive(s, a=300)
    (ahead,) = s.on(Stepped(0.1, "i0", 0.1, 100, 0, 100))
    assert isinstance(ahead, Ahead)
    assert ahead.to == "i1"
    s.instances["i1"].decodes, s.instances["i2"].decodes = 4, 4 - free
    s.instances["i1"].kv_tokens = 400  # the blocks that were given to it
    (decode,) = s.on(Prefilled(0.3, "a", 0, "i0", held=True))
    assert isinstance(decode, Decode)
    assert decode.on == on


def test_a_seat_is_free_when_as_many_have_ended_as_stand_before() -> None:
    # Of four decodes, which have theirs for 8 s, one ends every 2 s; one is queued before the newcomer.
    seats, full = Seats(), Instance("i0", Kind.D_HEAVY, 256, 1_000, 4, decodes=4, queued_requests=1)
    seats.left(6.0)
    seats.left(10.0)
    assert seats.wait(full) == pytest.approx(4.0, rel=0.01)
    full.decodes = 2
    assert seats.wait(full) == 0.0


def test_nobody_waits_for_more_stays_than_it_takes_all_seats_to_become_free() -> None:
    # One has begun to decode, and 299 are queued: 45 more seats than the 256 are needed, once.
    seats = Seats()
    seats.left(2.0)
    burst = Instance("i0", Kind.D_HEAVY, 256, 1_000, 256, decodes=1, queued_requests=299)
    assert seats.wait(burst) == 2.0
    burst.queued_requests = 555  # 301 more
    assert seats.wait(burst) == 4.0


def full(overload: str, stays: float) -> tuple[GlobalScheduler, Command]:
    """One instance, all of whose 4 seats are taken by decodes that have theirs for so long (s); and what
    becomes of a newcomer."""
    s = scheduler(Sliders(0, 1, 0, 100), seats=4, overload=overload)
    for name in "abcdx":
        decoding(s, name)
    s.on(Finished(stays, "x", 10))
    (command,) = arrive(s, at=stays, new=100)
    return s, command


def test_a_newcomer_whose_seat_is_free_in_time_is_predicted_to_wait_for_it() -> None:
    s, placed = full(REFUSE, 12.0)
    assert isinstance(placed, Prefill)
    assert s.requests["new"].predicted_ttft == pytest.approx(3.0)


def test_a_newcomer_whose_seat_comes_too_late_is_turned_away() -> None:
    _, declined = full(REFUSE, 16.0)
    assert isinstance(declined, Decline)
    assert declined.why == "its seat would be free in 4 s"


def test_or_is_best_effort() -> None:
    _, placed = full(DEMOTE, 16.0)
    assert isinstance(placed, Prefill)
    assert placed.best_effort
    assert placed.why.startswith("best effort: its seat would be free in 4 s")


@pytest.mark.parametrize(("decodes", "kind"), [(5, Prefill), (6, Decline)])
def test_a_decode_that_waits_for_a_seat_is_slower_by_the_share_that_is_lacking(
    decodes: int, kind: type[Command]
) -> None:
    # 20 ms, and 10 for each decode: 80 ms for six of the 5 seats, times 6/5; 90 ms for seven, times 7/5.
    s = scheduler(APART, seats=5, overload=DEMOTE, asked=FILLING)
    s.instances["i1"].decodes = decodes
    assert isinstance(arrive(s, a=100)[0], kind)


def test_an_instance_that_is_added_has_as_many_seats_as_the_others() -> None:
    s = scheduler(TOGETHER, seats=7)
    s.on(Added(0.0, "i2", Kind.D_HEAVY, 1_000, 100))
    assert s.instances["i2"].seats == 7
