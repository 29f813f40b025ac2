"""Overload by hand-made numbers: a prompt token takes 1 ms on the only instance, whose steps take 100 tokens.

SLO: TTFT 4 s. Best effort may wait 5 times as long, and 0.25 of the time is kept for it: 0.25 x 16 s = 4 s of
work. The prompts of the first two steps (200 tokens) cannot be put off any more. A prompt is in time
where it is predicted within 95 % of its SLO, 3.8 s.
"""

from __future__ import annotations

import pytest
from even import Even

from taichi_serve.messages import (
    Arrived,
    Cancelled,
    Command,
    Decline,
    Demote,
    Drained,
    Finished,
    Flow,
    Flowed,
    Lost,
    Move,
    Outcome,
    Prefill,
    Prefilled,
    Stepped,
)
from taichi_serve.request import Request
from taichi_serve.scheduling.policy import DEMOTE, REFUSE, SERVE, Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

ONE = Sliders(0, 1, 0, 100)


def scheduler(overload: str = DEMOTE, sliders: Sliders = ONE, leftover: float = 0.25) -> GlobalScheduler:
    capacities = {f"i{n}": 1_000_000 for n in range(sliders.instances)}
    policy = Policy(overload=overload, leftover=leftover, dwell=0.0)
    return GlobalScheduler(sliders, SLO(4.0, 0.1), Even(), policy, capacities)


def arrive(s: GlobalScheduler, at: float = 0.0, **prompts: int) -> list[Command]:
    """These come, one after the other; the commands."""
    return [command for name, tokens in prompts.items() for command in s.on(Arrived(at, name, tokens, 100))]


def order(s: GlobalScheduler, instance: str = "i0") -> list[str]:
    return [*s.ledger.queues[instance]]


def test_while_all_are_in_time_the_order_is_that_of_arrival_and_nobody_is_best_effort() -> None:
    s = scheduler()
    sent = arrive(s, a=1000, b=1700, c=1000)
    assert all(isinstance(command, Prefill) and not command.best_effort for command in sent)
    assert [command.by for command in sent if isinstance(command, Prefill)] == [4.0, 4.0, 4.0]
    assert order(s) == ["a", "b", "c"]


def test_serve_says_nothing_of_deadlines() -> None:
    sent = arrive(scheduler(SERVE), a=3000, b=3000, c=9000)
    assert [(c.by, c.best_effort) for c in sent if isinstance(c, Prefill)] == [(0.0, False)] * 3


def test_the_longest_before_a_prompt_that_would_be_late_is_put_off_and_all_others_are_in_time() -> None:
    # 300 + 2500 + 900 + 1500 ms is 1.2 s too late; without b the last one is there after 2.7 s.
    s = scheduler()
    *_, demoted, placed = arrive(s, a=300, b=2500, c=900, d=1500)
    assert isinstance(demoted, Demote)
    assert (demoted.request, demoted.leg, demoted.by) == ("b", 0, 16.0)
    assert demoted.why == "the longest before d, which would be late: TTFT 5.2 s of 4 s"
    assert isinstance(placed, Prefill)
    assert (placed.request, placed.best_effort) == ("d", False)
    assert order(s) == ["a", "c", "d", "b"]
    assert s.counters.best_effort == 1


def test_the_newcomer_itself_is_best_effort_where_it_is_the_longest() -> None:
    s = scheduler()
    *_, placed = arrive(s, a=300, b=1500, c=2500)
    assert isinstance(placed, Prefill)
    assert (placed.request, placed.best_effort, placed.by) == ("c", True, 16.0)
    assert placed.why.startswith("best effort: TTFT 4.3 s of 4 s")


def test_what_is_best_effort_costs_a_newcomer_nothing() -> None:
    s = scheduler()
    arrive(s, a=300, b=1500, c=2500)
    (placed,) = arrive(s, d=1900)
    assert isinstance(placed, Prefill)
    # c comes after it: 300 + 1500 + 1900 ms.
    assert placed.forecasts[0].ttft == pytest.approx(3.7)
    assert placed.forecasts[0].queued_prefill_tokens == 1800
    assert order(s) == ["a", "b", "d", "c"]


def test_a_prompt_that_may_be_in_a_step_already_is_not_put_off() -> None:
    # a is in the first two steps of 100 tokens, so it is b that makes way for c, though a is longer.
    s = scheduler()
    *_, demoted, _ = arrive(s, a=2500, b=1200, c=300)
    assert isinstance(demoted, Demote)
    assert demoted.request == "b"


def test_with_no_time_left_for_best_effort_the_newcomer_is_turned_away() -> None:
    # Best effort has 4 s: c takes 3.7 of them.
    s = scheduler()
    *_, declined = arrive(s, a=300, b=3400, c=3700, d=1000)
    assert isinstance(declined, Decline)
    assert (declined.request, declined.retry_after) == ("d", pytest.approx(7.4))
    assert declined.why == "TTFT 4.7 s of 4 s, and best effort would wait too long"
    assert declined.forecasts[0].ttft == pytest.approx(4.7)
    assert "d" not in s.requests
    assert s.counters.outcomes[Outcome.REFUSED] == 1


def test_refuse_turns_away_whoever_would_be_late_and_puts_nobody_off() -> None:
    s = scheduler(REFUSE)
    *sent, declined = arrive(s, a=300, b=3400, c=400)
    assert all(isinstance(command, Prefill) for command in sent)
    assert isinstance(declined, Decline)
    assert declined.why == "it would be late: TTFT 4.1 s of 4 s"
    assert order(s) == ["a", "b"]


def test_who_was_accepted_is_not_turned_away_when_its_instance_is_lost() -> None:
    s = scheduler(REFUSE, Sliders(0, 2, 0, 100))
    arrive(s, a=3000, b=3500)
    assert {r.instance for r in s.requests.values()} == {"i0", "i1"}
    gone = s.requests["b"].instance
    assert gone is not None
    (placed,) = s.on(Lost(0.1, gone, "killed"))
    assert isinstance(placed, Prefill)
    assert (placed.request, placed.best_effort) == ("b", True)


def test_when_an_instance_falls_behind_the_longest_that_makes_another_late_is_put_off() -> None:
    # At 2 s nothing but a is through: b, c and d need 3.2 s more, of the 2 s that are left.
    s = scheduler()
    arrive(s, a=300, b=1000, c=1500, d=700)
    s.on(Stepped(2.0, "i0", 2.0, 300, 0, 300))
    sent = s.on(Prefilled(2.0, "a", 0, "i0"))
    assert [(c.request, c.by) for c in sent if isinstance(c, Demote)] == [("c", 16.0)]
    assert order(s) == ["b", "d", "c"]


def test_best_effort_comes_before_newcomers_when_its_patience_ends() -> None:
    s = scheduler()
    arrive(s, a=100, b=200, c=3600)  # c is best effort until 16 s
    arrive(s, at=11.5, d=100)  # due at 15.5
    assert order(s) == ["a", "b", "d", "c"]
    arrive(s, at=12.5, e=100)  # due at 16.5, and c comes first
    assert order(s) == ["a", "b", "d", "c", "e"]


def test_who_leaves_frees_the_time_of_best_effort() -> None:
    s = scheduler()
    arrive(s, a=300, b=3400, c=3700)
    s.on(Cancelled(0.1, "c"))
    demoted, placed = arrive(s, d=1000)
    assert isinstance(demoted, Demote)
    assert isinstance(placed, Prefill)
    assert (demoted.request, placed.request) == ("b", "d")


def test_best_effort_is_degraded_before_a_longer_output_and_does_not_flow_back() -> None:
    s = scheduler(sliders=Sliders(1, 1, 100, 100))
    instances = s.instances
    for name, best_effort in (("long", False), ("late", True)):
        arrive(s, **{name: 100})
        request = s.requests[name]
        here = request.instance
        assert here is not None
        request.best_effort = best_effort
        held = here == "i0"
        s.on(Prefilled(0.0, name, 0, here, held=held))
        if held:
            s.on(Flowed(0.0, name, 1, "i1", 1, 100, 0.05))
        for _ in range(20):
            s.on(Stepped(0.0, "i1", 0.02, 0, 1, 1000))
    full = int(0.96 * instances["i1"].kv_capacity)
    sent = s.on(Stepped(0.5, "i1", 0.02, 0, 2, full))
    assert next((c.request, c.move) for c in sent if isinstance(c, Flow)) == ("late", Move.DEGRADE)
    s.on(Flowed(0.6, "late", s.requests["late"].leg, "i0", 30, 130, 0.05))
    assert s.on(Stepped(60.0, "i0", 1.0, 0, 1, 200)) == []
    s.on(Finished(61.0, "late", 40))
    s.on(Finished(61.0, "long", 80))
    assert not s.requests


def test_overload_must_be_one_of_three_words() -> None:
    with pytest.raises(ValueError, match="overload 'shed' is none of serve, demote, refuse"):
        Policy(overload="shed")


def test_long_prompts_are_protected_when_those_in_time_are_shorter_than_all() -> None:
    # Of prompts of 100 and 1900 tokens only the short ones were in time; a token belongs to one of 1810.
    s = scheduler()
    triage = s._dispatcher.triage
    for n in range(100):
        triage.came(Request(f"r{n}", 0.0, 100 if n % 2 else 1900, 10, s.slo))
        triage.through(Request(f"r{n}", 0.0, 100, 10, s.slo), 1.0)
    assert triage.unfair() == 1.0
    short, long = Request("short", 0.0, 100, 10, s.slo), Request("long", 0.0, 2400, 10, s.slo)
    here = s.instances["i0"]
    # A short one leaves the time of one of 1.3 x 1810 tokens, but no more than half of the SLO.
    assert triage.reserve(short, here, 1.0, triage.protected()) == pytest.approx(2.0 - 0.1)
    assert triage.reserve(long, here, 1.0, triage.protected()) == 0.0
    arrive(s, a=300, b=1500)
    (placed,) = arrive(s, c=500)
    assert isinstance(placed, Prefill)
    assert placed.best_effort
    assert s.requests["c"].predicted_ttft == pytest.approx(2.3)


def test_nothing_is_reserved_while_all_lengths_are_served_alike() -> None:
    s = scheduler()
    triage = s._dispatcher.triage
    for n in range(100):
        request = Request(f"r{n}", 0.0, 100 if n % 2 else 1900, 10, s.slo)
        triage.came(request)
        triage.through(request, 1.0)
    assert triage.unfair() == 0.0


def with_decodes(decodes: int, base: float) -> GlobalScheduler:
    """An instance on which so many requests decode: each adds 10 ms to a token; SLO 100 ms."""
    policy = Policy(overload=DEMOTE, dwell=0.0)
    s = GlobalScheduler(ONE, SLO(4.0, 0.1), Even(base=base, each=0.01), policy, {"i0": 1_000_000})
    s.instances["i0"].decodes = decodes
    return s


def test_while_a_decode_would_keep_its_tpot_the_newcomer_is_taken_in() -> None:
    # 20 + 7 x 10 ms, and 10 ms for itself: 100 ms.
    (placed,) = arrive(with_decodes(7, base=0.02), a=100)
    assert isinstance(placed, Prefill)


def test_a_newcomer_that_would_make_all_decodes_miss_their_tpot_is_turned_away() -> None:
    (declined,) = arrive(with_decodes(8, base=0.02), a=100)
    assert isinstance(declined, Decline)
    assert declined.why == "its TPOT, and that of others, would be above 100 ms"


def test_half_of_those_queued_will_decode_before_it() -> None:
    # 19 + 6 x 10 ms, 10 for itself, and 5 for each of those queued: 89, 94 and 99 ms, and then 104.
    s = with_decodes(6, base=0.019)
    kinds = [type(command) for command in arrive(s, a=100, b=100, c=100, d=100)]
    assert kinds == [Prefill, Prefill, Prefill, Decline]


def test_where_an_idle_instance_is_too_slow_nobody_is_turned_away_for_it() -> None:
    (placed,) = arrive(with_decodes(3, base=0.11), a=100)
    assert isinstance(placed, Prefill)


@pytest.mark.parametrize(
    ("used", "watermark", "kind"),
    [(6_000, 1.0, Prefill), (9_000, 1.0, Decline), (9_000, 0.95, Prefill)],
)
def test_a_decode_that_waits_for_room_that_nobody_else_has_is_late(
    used: int, watermark: float, kind: type[Command]
) -> None:
    # 20 + 3 x 10 ms, and 10 ms for itself. Its 9,000 tokens are half, or 80 %, more than there is room for:
    # 90 or 108 ms. Where decodes may be degraded it would find room on the P-heavy instance.
    policy = Policy(overload=DEMOTE, dwell=0.0, watermark=watermark)
    sizes = {"i0": 1_000_000, "i1": 10_000}
    s = GlobalScheduler(Sliders(1, 1, 100, 0), SLO(4.0, 0.1), Even(1e-4, base=0.02, each=0.01), policy, sizes)
    low = s.instances["i1"]
    low.decodes, low.kv_tokens = 3, used
    assert isinstance(arrive(s, a=9_000)[0], kind)


def behind(at: float, *later: Arrived, movable: bool = True) -> tuple[GlobalScheduler, list[Command]]:
    """Five prompts on i0, while i1 is drained; by this time only the first is through, and the longest, d,
    makes others late."""
    s = scheduler(sliders=Sliders(0, 2, 0, 100))
    s.on(Drained(0.0, "i1"))
    for name, tokens in (("a", 300), ("b", 300), ("c", 1000), ("d", 1500), ("e", 600)):
        s.on(Arrived(0.0, name, tokens, 100, movable))
    s.on(Drained(0.0, "i1", on=False))
    for one in later:
        s.on(one)
    s.on(Stepped(at, "i0", at, 300, 0, 300))
    return s, s.on(Prefilled(at, "a", 0, "i0"))


def test_when_an_instance_falls_behind_a_prompt_goes_where_it_is_in_time() -> None:
    s, (moved,) = behind(1.6)
    assert isinstance(moved, Prefill)
    assert (moved.request, moved.leg, moved.on, moved.best_effort) == ("d", 1, "i1", False)
    assert moved.why.startswith("i0 fell behind; ")
    assert (order(s), order(s, "i1")) == (["b", "c", "e"], ["d"])
    assert s.instances["i0"].queued_tokens == 1900
    assert s.on(Prefilled(3.1, "d", 0, "i0")) == []  # of the leg before: too late
    s.on(Prefilled(3.1, "d", 1, "i1"))
    assert s.requests["d"].instance == "i1"


def test_it_is_best_effort_where_it_would_be_late_there_too() -> None:
    # d would be there after 2.4 + 1.5 s. The next one, c, is in time.
    _, sent = behind(2.4)
    assert [(c.request, type(c)) for c in sent if isinstance(c, Prefill | Demote)] == [
        ("d", Demote),
        ("c", Prefill),
    ]


def test_it_is_best_effort_where_it_would_make_another_late() -> None:
    # y is in a step already; x has to wait for d, and ends 1.3 s after its deadline.
    s, sent = behind(1.6, Arrived(1.5, "y", 300, 100), Arrived(1.5, "x", 3400, 100))
    assert {s.requests[name].instance for name in "xy"} == {"i1"}
    assert [(c.request, type(c)) for c in sent if isinstance(c, Prefill | Demote)] == [("d", Demote)]


def test_a_request_that_cannot_move_stays_where_it_is_queued() -> None:
    _, sent = behind(1.6, movable=False)
    assert [(c.request, type(c)) for c in sent if isinstance(c, Prefill | Demote)] == [("d", Demote)]
