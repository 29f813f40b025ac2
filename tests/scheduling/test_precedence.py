"""Classes of requests under overload, by hand-made numbers: a prompt token takes 1 ms on the only instance.

SLO: TTFT 4 s; a prompt is in time where it is predicted within 3.8 s. Steps take 100 tokens, and the prompts
of the first two are not put off any more. Best effort has 4 s of work (see test_overload.py). An output token
takes 20 ms, and 10 ms more for each decode.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from even import Even

from taichi_serve.classes import SLOClass
from taichi_serve.messages import (
    Arrived,
    Command,
    Decline,
    Demote,
    Finished,
    Prefill,
    Prefilled,
    Stepped,
)
from taichi_serve.request import Request
from taichi_serve.scheduling.policy import DEMOTE, REFUSE, Policy
from taichi_serve.scheduling.precedence import Precedence
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

SERVERS = SLO(4.0, 0.1)
BATCH, CHAT = SLOClass("batch", weight=0.5), SLOClass("chat", weight=2.0)


def scheduler(
    *classes: SLOClass, overload: str = DEMOTE, fair: bool = False, leftover: float = 0.25
) -> GlobalScheduler:
    policy = Policy(overload=overload, leftover=leftover, dwell=0.0, classes=classes, fair=fair)
    asked = Even(base=0.02, each=0.01)
    return GlobalScheduler(Sliders(0, 1, 0, 100), SERVERS, asked, policy, {"i0": 10_000_000})


def arrive(
    s: GlobalScheduler, slo_class: str | None, at: float = 0.0, slo: SLO | None = None, **prompts: int
) -> list[Command]:
    """These come, one after the other, and have one output token; the commands."""
    arrived = [Arrived(at, name, tokens, 1, slo=slo, slo_class=slo_class) for name, tokens in prompts.items()]
    return [command for one in arrived for command in s.on(one)]


def order(s: GlobalScheduler) -> list[str]:
    return [*s.ledger.queues["i0"]]


def demoted(commands: list[Command]) -> list[str]:
    return [command.request for command in commands if isinstance(command, Demote)]


# -------------------------------------------------------------------------------- who may not be refused


@pytest.mark.parametrize("overload", [DEMOTE, REFUSE])
def test_a_class_that_may_not_be_refused_is_best_effort_instead(overload: str) -> None:
    s = scheduler(SLOClass("kept", refuse=False), overload=overload)
    arrive(s, None, a=300, b=3400)
    (placed,) = arrive(s, "kept", c=3500)
    assert isinstance(placed, Prefill)
    assert (placed.request, placed.best_effort) == ("c", True)


def test_it_is_taken_in_even_where_best_effort_has_no_time_left_for_it() -> None:
    # Best effort has 4 s: c takes 3.7 of them. Of two that come alike only the one of the class gets in.
    s = scheduler(SLOClass("kept", refuse=False))
    arrive(s, None, a=300, b=3400, c=3700)
    (declined,) = arrive(s, None, d=1000)
    assert isinstance(declined, Decline)
    demote, placed = arrive(s, "kept", e=1000)
    assert isinstance(demote, Demote)
    assert isinstance(placed, Prefill)
    assert (demote.request, placed.request, placed.best_effort) == ("b", "e", False)


def test_it_is_not_turned_away_for_its_tpot() -> None:
    s = scheduler(SLOClass("kept", refuse=False), SLOClass("bound", refuse=False, demote=False))
    s.instances["i0"].decodes = 9  # 120 ms with one more
    (declined,) = s.on(Arrived(0.0, "a", 100, 50))
    assert isinstance(declined, Decline)
    (put_off,) = s.on(Arrived(0.0, "b", 100, 50, slo_class="kept"))
    (served,) = s.on(Arrived(0.0, "c", 100, 50, slo_class="bound"))
    assert isinstance(put_off, Prefill)
    assert isinstance(served, Prefill)
    assert (put_off.best_effort, served.best_effort) == (True, False)


# -------------------------------------------------------------------------------- who may not be demoted


def test_a_class_that_may_not_be_demoted_is_no_victim() -> None:
    # b would be the longest; without c the newcomer is there after 0.3 + 1.7 + 1 s.
    s = scheduler(SLOClass("kept", demote=False))
    arrive(s, None, a=300)
    arrive(s, "kept", b=1700)
    arrive(s, None, c=1200)
    assert demoted(arrive(s, None, d=1000)) == ["c"]
    assert order(s) == ["a", "b", "d", "c"]


def test_nor_is_it_one_when_its_instance_falls_behind() -> None:
    s = scheduler(SLOClass("kept", demote=False))
    arrive(s, None, a=300, b=300, e=900)
    arrive(s, "kept", c=1500)
    arrive(s, None, d=700)
    s.on(Stepped(1.6, "i0", 1.6, 300, 0, 300))
    assert demoted(s.on(Prefilled(1.6, "a", 0, "i0"))) == ["e"]


def test_a_newcomer_that_may_not_be_demoted_is_turned_away_or_is_served_late_where_it_may_not_be_either() -> (
    None
):
    s = scheduler(SLOClass("sure", demote=False), SLOClass("both", demote=False, refuse=False))
    arrive(s, "both", a=300, b=3400)
    (declined,) = arrive(s, "sure", c=500)
    assert isinstance(declined, Decline)
    assert declined.why == "TTFT 4.2 s of 4 s"
    (late,) = arrive(s, "both", d=500)
    assert isinstance(late, Prefill)
    assert not late.best_effort
    assert order(s) == ["a", "b", "d"]


def test_others_make_way_for_one_that_may_not_be_demoted_however_short_they_are() -> None:
    s = scheduler(SLOClass("sure", demote=False))
    arrive(s, None, a=300, b=1000, c=800)
    assert demoted(arrive(s, "sure", d=2800)) == ["b", "c"]


def test_one_that_would_be_late_on_an_idle_server_is_not_turned_away() -> None:
    (placed,) = arrive(scheduler(SLOClass("sure", demote=False)), "sure", a=5000)
    assert isinstance(placed, Prefill)
    assert not placed.best_effort


# ----------------------------------------------------------------------------------------------- weights


def test_the_lowest_weight_goes_first_and_as_many_as_it_takes() -> None:
    # 300 + 1500 + 1000 + 700 + 1500 ms: 1.2 s too much. The longest of batch is not enough.
    s = scheduler(BATCH, CHAT)
    arrive(s, None, a=300, b=1500)
    arrive(s, "batch", c=700, d=1000)
    assert demoted(arrive(s, "chat", e=1500)) == ["d", "c"]
    assert order(s) == ["a", "b", "e", "c", "d"]


def test_nobody_of_a_higher_weight_makes_way_for_a_lower_one() -> None:
    s = scheduler(BATCH, CHAT)
    arrive(s, None, a=300)
    arrive(s, "chat", b=3000)
    (placed,) = arrive(s, "batch", c=600)
    assert isinstance(placed, Prefill)
    assert (placed.request, placed.best_effort) == ("c", True)


def test_when_an_instance_falls_behind_the_lowest_weight_goes_before_the_longest() -> None:
    # At 1.4 s the others need 3.3 s of the 2.8 s that are left.
    s = scheduler(BATCH)
    arrive(s, None, a=300, e=300)
    arrive(s, "batch", b=600)
    arrive(s, None, c=1500, d=900)
    s.on(Stepped(1.4, "i0", 1.4, 300, 0, 300))
    assert demoted(s.on(Prefilled(1.4, "a", 0, "i0"))) == ["b"]


def test_refuse_puts_off_a_lower_weight_for_a_higher_one_and_nobody_for_an_equal_one() -> None:
    s = scheduler(BATCH, CHAT, overload=REFUSE)
    arrive(s, None, a=300)
    arrive(s, "batch", b=3000)
    assert demoted(arrive(s, "chat", c=1000)) == ["b"]
    s = scheduler(BATCH, CHAT, overload=REFUSE)
    arrive(s, None, a=300)
    arrive(s, "batch", b=3000)
    (declined,) = arrive(s, "batch", c=1000)
    assert isinstance(declined, Decline)
    assert declined.why == "it would be late: TTFT 4.3 s of 4 s"


def test_while_a_class_falls_short_the_lower_ones_leave_room_for_its_next_prompt() -> None:
    # A chat was turned away. The mean prompt is of 1 s, and 1.3 times that is left free, of 3.8 s.
    s = scheduler(BATCH, CHAT, overload=REFUSE)
    arrive(s, "chat", a=1000, b=1000, c=1000)
    (declined,) = arrive(s, "chat", d=1000)
    assert isinstance(declined, Decline)
    s.on(Stepped(1.0, "i0", 1.0, 1000, 0, 1000))
    s.on(Prefilled(1.0, "a", 0, "i0"))
    (declined,) = arrive(s, "batch", at=1.0, e=600)  # 2 + 0.6 + 1.3 s
    assert isinstance(declined, Decline)
    assert declined.why == "it would leave no room for class chat"
    (placed,) = arrive(s, "batch", at=1.0, f=400)
    assert isinstance(placed, Prefill)
    # A chat takes the room; and it is forgotten 5 times the TTFT SLO later.
    (placed,) = arrive(s, "chat", at=1.0, g=1300)
    assert isinstance(placed, Prefill)
    later = scheduler(BATCH, CHAT, overload=REFUSE)
    arrive(later, "chat", a=1000, b=1000, c=1000, d=1000)
    for name in ("a", "b", "c"):
        later.on(Finished(3.0, name, 1))
    assert [type(c) for c in arrive(later, "batch", at=20.5, e=3000)] == [Prefill]


def test_they_leave_it_two_decodes_too() -> None:
    # 20 + 10 n ms: nine decodes are too slow. Batch gets in beside five: with its own, two are to spare.
    s = scheduler(BATCH, CHAT, overload=REFUSE)
    s.instances["i0"].decodes = 8
    assert [type(c) for c in s.on(Arrived(0.0, "a", 100, 50, slo_class="chat"))] == [Decline]
    for decodes, kind in ((6, Decline), (5, Prefill)):
        s.instances["i0"].decodes = decodes
        assert [type(c) for c in s.on(Arrived(0.0, f"b{decodes}", 100, 50, slo_class="batch"))] == [kind]


@pytest.mark.parametrize("overload", [DEMOTE, REFUSE])
def test_of_many_decodes_they_leave_it_a_fifth_and_are_turned_away_for_that_in_both_modes(
    overload: str,
) -> None:
    # 20 + 2 n ms: 41 decodes are too slow. Batch gets in beside 32, of which 6.4 are to spare.
    s = scheduler(BATCH, CHAT, overload=overload)
    s._dispatcher.predictor.each = 0.002  # type: ignore[attr-defined]
    s.instances["i0"].decodes = 40
    assert [type(c) for c in s.on(Arrived(0.0, "a", 100, 50, slo_class="chat"))] == [Decline]
    for decodes, kind in ((33, Decline), (32, Prefill)):
        s.instances["i0"].decodes = decodes
        assert [type(c) for c in s.on(Arrived(0.0, f"b{decodes}", 100, 50, slo_class="batch"))] == [kind]


def test_a_request_that_an_idle_server_could_not_serve_in_time_makes_no_class_fall_short() -> None:
    s = scheduler(BATCH, CHAT)
    (placed,) = arrive(s, "chat", slo=SLO(0.01, 0.1), a=500)
    assert isinstance(placed, Prefill)
    assert placed.best_effort
    batch = Request("b", 0.0, 100, 1, SERVERS, slo_class="batch")
    assert s._dispatcher.triage.precedence.above(batch, 0.0) == []


def test_with_equal_weights_nobody_gives_way() -> None:
    known = Precedence(Policy(classes=(SLOClass("a"), SLOClass("b", demote=False))))
    a, b = (Request(name, 0.0, 100, 1, SERVERS, slo_class=name) for name in "ab")
    known.lost(a, 0.0)
    assert (known.above(b, 0.0), known.place(a), known.place(b)) == ([], 0.0, 0.0)
    assert [known.rights(one).demote for one in (a, b)] == [True, False]
    assert known.rights(Request("c", 0.0, 1, 1, SERVERS, slo_class="unknown")).name == "default"


# ------------------------------------------------------------------- strict ones, and loose ones after them

STRICT, PATIENT = SLO(1.0, 0.1), SLO(10.0, 0.1)


def test_among_equals_a_strict_prompt_overtakes_patient_ones_whatever_becomes_of_them() -> None:
    # The patient ones end at 9.5 s, and at 10.1 s with both.
    s = scheduler(SLOClass("chat"), overload=REFUSE)
    arrive(s, None, slo=PATIENT, a=300, b=6000, c=3200)
    assert [type(c) for c in arrive(s, "chat", slo=STRICT, d=500, e=100)] == [Prefill, Prefill]
    assert order(s) == ["a", "d", "e", "b", "c"]


def test_with_a_lower_weight_it_is_turned_away_where_one_after_it_would_be_late() -> None:
    s = scheduler(BATCH, overload=REFUSE)
    arrive(s, None, slo=PATIENT, a=300, b=6000, c=3200)
    assert [type(c) for c in arrive(s, "batch", slo=STRICT, d=400)] == [Prefill]
    (declined,) = arrive(s, "batch", at=0.1, slo=STRICT, e=200)  # 0.1 + 10.1 s
    assert isinstance(declined, Decline)
    assert declined.why == "c after it would be 0.2 s late"


def test_with_a_higher_weight_those_after_it_make_way() -> None:
    s = scheduler(CHAT, overload=REFUSE)
    arrive(s, None, slo=PATIENT, a=300, b=6000, c=3200)
    assert [type(c) for c in arrive(s, "chat", slo=STRICT, d=500)] == [Prefill]
    assert demoted(arrive(s, "chat", slo=STRICT, e=100)) == ["b"]
    assert order(s) == ["a", "d", "e", "c", "b"]


# ------------------------------------------------------------------------------------------- fair shares


def in_time(
    s: GlobalScheduler, length: dict[str, int], every: dict[str, float], seconds: float
) -> Counter[str]:
    """Each class sends prompts of one length at a steady pace, and the instance computes 1,000 tokens a
    second in steps of 100; the prompt tokens of each class that were in time."""
    arrivals = sorted(
        (k * pause + 0.001 * n, name)
        for n, (name, pause) in enumerate(every.items())
        for k in range(int(seconds / pause))
    )
    got: Counter[str] = Counter()
    now = 0.0
    for number, (at, name) in enumerate(arrivals):
        while now + 0.1 <= at:
            now = round(now + 0.1, 9)
            if (first := s.ledger.first(s.instances["i0"])) is not None and first.arrived_at < now - 0.1:
                compute(s, first, now, got)
        (known,) = (one for one in s.policy.classes if one.name == name)
        s.on(Arrived(at, f"{name}{number}", length[name], 1, slo=known.slo(SERVERS), slo_class=name))
    return got


def compute(s: GlobalScheduler, first: Request, now: float, got: Counter[str]) -> None:
    """100 tokens of it."""
    here = s.instances["i0"]
    s.on(Stepped(now, "i0", 0.1, 100, 0, 100))
    if here.progress_tokens >= first.prompt_tokens:
        s.on(Prefilled(now, first.id, 0, "i0"))
        s.on(Finished(now, first.id, 1))
        if now - first.arrived_at <= first.slo.ttft:
            got[first.slo_class or "default"] += first.prompt_tokens


def share(got: Counter[str], name: str) -> float:
    return got[name] / got.total()


A, B = SLOClass("a"), SLOClass("b")
A_BIG, B_BIG = replace(A, weight=3.0), replace(B, weight=3.0)
QUICK, SLOW = replace(A, ttft_slo=1.0), replace(B, ttft_slo=10.0)
SAME = {"a": 400, "b": 400}


@pytest.mark.parametrize("overload", [DEMOTE, REFUSE])
@pytest.mark.parametrize(
    ("a", "b", "length", "expected"),
    [
        (A, B, SAME, 0.5),
        (A_BIG, B, SAME, 0.75),
        (replace(A, weight=9.0), B, SAME, 0.9),
        (A, B, {"a": 200, "b": 1600}, 0.5),
        (A, B_BIG, {"a": 200, "b": 1600}, 0.25),
        (QUICK, SLOW, {"a": 200, "b": 800}, 0.5),
        (QUICK, replace(SLOW, weight=3.0), {"a": 200, "b": 800}, 0.25),
        (replace(QUICK, weight=3.0), SLOW, {"a": 200, "b": 800}, 0.75),
    ],
)
def test_fair_weights_are_shares_of_what_is_computed_in_time(
    overload: str, a: SLOClass, b: SLOClass, length: dict[str, int], expected: float
) -> None:
    # Each class sends twice what the server can do. Within 10 % of the shares.
    s = scheduler(a, b, overload=overload, fair=True, leftover=0.03)
    got = in_time(s, length, {name: tokens / 2000 for name, tokens in length.items()}, 300)
    assert share(got, "a") == pytest.approx(expected, rel=0.1)
    assert share(got, "b") == pytest.approx(1 - expected, rel=0.1)
    assert got.total() > 0.9 * 300_000


def test_a_class_that_asks_for_less_than_its_share_gets_all_of_it_and_the_rest_is_for_the_others() -> None:
    s = scheduler(A, B, overload=REFUSE, fair=True, leftover=0.03)
    got = in_time(s, SAME, {"a": 4.0, "b": 0.2}, 300)
    assert got["a"] == pytest.approx(0.1 * 300_000, rel=0.05)
    assert got.total() > 0.95 * 300_000


def test_without_fair_shares_the_higher_weight_gets_what_it_asks_for() -> None:
    s = scheduler(A_BIG, B, overload=REFUSE, leftover=0.03)
    got = in_time(s, SAME, {"a": 0.5, "b": 0.2}, 300)
    assert got["a"] > 0.95 * 0.8 * 300_000
    assert got.total() > 0.95 * 300_000


def test_those_that_may_be_refused_give_way_at_the_door_to_a_class_that_may_not() -> None:
    s = scheduler(replace(A, refuse=False), B, overload=REFUSE, leftover=0.03)
    got = in_time(s, SAME, {"a": 0.5, "b": 0.2}, 300)
    assert got["a"] > 0.9 * 0.8 * 300_000
    assert got.total() > 0.9 * 300_000
