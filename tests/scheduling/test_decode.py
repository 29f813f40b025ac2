"""Algorithm 1 by hand-made numbers: what the paper leaves open, as docs/decisions/101 to 104 decide it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from taichi_serve.instance import Instance
from taichi_serve.messages import Flowed, Move, Stepped
from taichi_serve.request import Request, State
from taichi_serve.scheduling.decode import (
    Search,
    choose_backflow,
    choose_degrade,
    choose_start,
    choose_target,
)
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.residency import Prefix
from taichi_serve.scheduling.residents import Residents
from taichi_serve.scheduling.room import load_after
from taichi_serve.sliders import Kind
from taichi_serve.slo import SLO

ALPHA, SLO_100MS = 0.96, SLO(4.0, 0.1)  # so a TPOT of 96 ms crosses
STILL = Policy(dwell=0.0, growth=0)  # no growth, so that the numbers stay round


@dataclass
class ByHand:
    """A move takes 50 ms; a token takes 250 ms on i0 and 30 ms elsewhere."""

    move_seconds: float = 0.05
    tpots: dict[str, float] = field(default_factory=lambda: {"i0": 0.25})

    def ttft(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        raise NotImplementedError

    def work(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        raise NotImplementedError

    def fetch(self, source: Instance, target: Instance, kv_tokens: int) -> float:
        raise NotImplementedError

    def since(self, instance: Instance, elapsed: float) -> float:
        return 0.0

    def tpot(self, instance: Instance, kv_tokens: int) -> float:
        return self.tpots.get(instance.name, 0.03)

    def move(self, source: Instance, target: Instance, kv_tokens: int, held: int = 0) -> float:
        return self.move_seconds * (1 - held / kv_tokens)

    def stepped(self, instance: Instance, step: Stepped) -> None: ...

    def flowed(self, source: Instance, target: Instance, move: Flowed) -> None: ...


def p_heavy(name: str = "i0", kv: int = 0, queued: int = 0) -> Instance:
    return Instance(name, Kind.P_HEAVY, 1024, 10_000, kv_tokens=kv, queued_tokens=queued)


def d_heavy(name: str = "i1", kv: int = 0, reserved: int = 0) -> Instance:
    return Instance(name, Kind.D_HEAVY, 256, 10_000, kv_tokens=kv, reserved_tokens=reserved)


def decode(
    name: str,
    output: int,
    first_at: float = 0.0,
    prompt: int = 1000,
    limit: int = 2000,
    slo: SLO = SLO_100MS,
) -> Request:
    return Request(name, 0.0, prompt, limit, slo, state=State.DECODING, first_at=first_at, base=output)


def residents(*requests: Request, policy: Policy = STILL) -> tuple[Residents, dict[str, Request]]:
    here = Residents(ALPHA, policy.max_degrades)
    for request in requests:
        here.add(request)
    return here, {r.id: r for r in requests}


def degraded(
    *requests: Request, helpers: list[Instance], now: float = 1.0, policy: Policy = STILL, gap: float = 0.05
) -> str | None:
    source = d_heavy(kv=9_600)
    here, ledger = residents(*requests, policy=policy)
    choice = choose_degrade(source, here, ledger, helpers, now, ByHand(gap), policy)
    return f"{choice[0].id} to {choice[1].name}" if choice else None


# ------------------------------------------------------------------------------------------- 101: targets


def test_target_is_the_one_that_will_be_least_full() -> None:
    # 1000 tokens more: 0.6, 0.5 and, with 2000 promised to others, 0.6.
    instances = [d_heavy("i1", 5_000), d_heavy("i2", 4_000), d_heavy("i3", 3_000, reserved=2_000)]
    target = choose_target(instances, 1_000, 0.95, STILL)
    assert target is instances[1]


def test_queued_prompts_count_as_load_of_a_target() -> None:
    assert (
        degraded(decode("a", 100), helpers=[p_heavy("i0", queued=3_000), p_heavy("i2", 2_000)]) == "a to i2"
    )


def test_equal_targets_are_taken_in_order() -> None:
    instances = [d_heavy("i1", 4_000), d_heavy("i2", 4_000)]
    assert choose_target(instances, 1_000, 0.95, STILL) is instances[0]


def test_target_with_all_its_decode_slots_taken_is_no_target() -> None:
    full = d_heavy("i1")
    full.decodes, full.arriving, full.seats = 3, 1, 4
    assert choose_target([full], 1_000, 0.95, STILL) is None


def test_decode_starts_below_the_watermark_then_where_there_is_room_then_where_it_prefilled() -> None:
    here, request = p_heavy(), decode("a", 1, prompt=999)
    calm, busy, full = d_heavy("i1", 8_000), d_heavy("i2", 8_800), d_heavy("i3", 9_500)
    assert choose_start(request, here, [here, full, busy, calm], STILL)[0] is calm
    assert choose_start(request, here, [here, full, busy], STILL)[0] is busy  # 0.98: past the watermark
    assert choose_start(request, here, [here, full], STILL)[0] is here


def test_decode_of_a_disaggregated_service_waits_for_the_emptiest_d_heavy_instance() -> None:
    here, never = p_heavy(), Policy(watermark=1.0, growth=0)
    full, fuller = d_heavy("i1", 9_500), d_heavy("i2", 9_600)
    assert choose_start(decode("a", 1, prompt=999), here, [here, fuller, full], never)[0] is full


def test_decode_stays_on_the_d_heavy_instance_that_prefilled_it_or_joins_it_after_a_slider() -> None:
    here, emptier = d_heavy("i1", 5_000), d_heavy("i2", 0)
    assert choose_start(decode("a", 1), here, [here, emptier], STILL)[0] is here


# --------------------------------------------------------------------------- 102: hysteresis and budget


def test_request_that_was_degraded_twice_is_left_alone() -> None:
    old, young = decode("old", 500), decode("young", 100)
    old.moves[Move.DEGRADE] = 2
    assert degraded(old, young, helpers=[p_heavy()]) == "young to i0"


def test_request_that_just_moved_is_left_alone() -> None:
    old, young = decode("old", 500), decode("young", 100)
    old.moved_at = 0.75
    assert degraded(old, young, helpers=[p_heavy()], policy=Policy(growth=0, dwell=0.3)) == "young to i0"
    assert degraded(old, young, helpers=[p_heavy()], policy=Policy(growth=0, dwell=0.25)) == "old to i0"


def test_backflow_needs_the_hysteresis_below_the_watermark() -> None:
    request = decode("a", 100, first_at=-100.0)
    here, ledger = residents(request)
    for kv, lands in ((7_900, True), (7_901, False)):  # with 1,100 tokens of its own: 0.90 and a little more
        target = d_heavy(kv=kv)
        choice = choose_backflow(p_heavy(), here, ledger, [target], 1.0, ByHand(), STILL)
        assert (choice is not None) == lands


# ------------------------------------------------------------------------- 103: move, recompute or stay


def test_request_without_slack_for_the_gap_is_passed_over() -> None:
    # 100 tokens bank 99 x 96 ms = 9.504 s; the first token is 9.4 s ago: 104 ms are left.
    tight, loose = decode("tight", 100, first_at=-8.4), decode("loose", 50, first_at=0.9)
    assert degraded(tight, loose, helpers=[p_heavy()], gap=0.10) == "tight to i0"
    assert degraded(tight, loose, helpers=[p_heavy()], gap=0.11) == "loose to i0"


def test_request_about_to_end_is_not_degraded() -> None:
    ending, other = decode("ending", 500, limit=508), decode("other", 100)
    assert degraded(ending, other, helpers=[p_heavy()], policy=Policy(dwell=0.0, growth=8)) == "other to i0"


def test_who_was_preempted_is_passed_over_however_many_they_are() -> None:
    # They hold no KV, and eight candidates are looked at.
    names = [f"a{n}" for n in range(9)]
    here, ledger = residents(*(decode(name, 200) for name in names), decode("b", 100))
    source, helper = d_heavy(kv=9_600), p_heavy(kv=1_000)

    def choice(*missed: str) -> object:
        source.missed = missed
        found = choose_degrade(source, here, ledger, [helper], 1.0, ByHand(), STILL)
        return found and found[0].id

    assert choice() == "a0"
    assert choice(*names) == "b"
    assert choice(*names, "b") is None


def test_nobody_is_degraded_when_no_p_heavy_instance_has_room() -> None:
    assert degraded(decode("a", 500), helpers=[p_heavy(kv=9_000)]) is None
    assert degraded(decode("a", 500), helpers=[]) is None


def test_smaller_request_goes_when_the_longest_does_not_fit() -> None:
    long, small = decode("long", 500, prompt=3_000), decode("small", 100, prompt=500)
    assert degraded(long, small, helpers=[p_heavy(kv=7_000)]) == "small to i0"


def test_backflow_stays_when_the_tokens_to_come_do_not_pay_for_the_gap() -> None:
    # 220 ms saved a token: a gap of 1.0 s is paid by five tokens, not by four.
    for left, goes in ((4, False), (5, True)):
        request = decode("a", 100, first_at=-100.0, limit=100 + left)
        here, ledger = residents(request)
        choice = choose_backflow(p_heavy(), here, ledger, [d_heavy()], 1.0, ByHand(1.0), STILL)
        assert (choice is not None) == goes


def test_backflow_stays_when_d_heavy_is_no_faster() -> None:
    here, ledger = residents(decode("a", 100, first_at=-100.0))
    slow = ByHand(tpots={"i0": 0.25, "i1": 0.25})
    assert choose_backflow(p_heavy(), here, ledger, [d_heavy()], 1.0, slow, STILL) is None


# -------------------------------------------------------------------------------- 104: room and growth


def test_load_counts_what_everybody_grows_by_during_the_move() -> None:
    instance = d_heavy(kv=5_000, reserved=500)
    instance.decodes = 9
    # 5000 + 500 + 1000 and 10 x 8 tokens of growth.
    assert load_after(instance, 1_000, Policy(growth=8)) == 0.658


def test_the_first_to_cross_is_found_without_looking_at_the_others() -> None:
    early, late = decode("early", 50, first_at=0.0), decode("late", 50, first_at=2.0)
    here, _ = residents(early, late)
    # 49 x 96 ms = 4.704 s after its first token, and 96 ms more with every tick.
    assert list(here.crossing(4.70, ticks=0)) == []
    assert list(here.crossing(4.71, ticks=0)) == ["early"]
    assert list(here.crossing(6.71, ticks=0)) == ["early", "late"]
    assert list(here.crossing(6.71, ticks=21)) == []


# --------------------------------------------------------------------------------------------- prefixes


def test_what_an_instance_has_of_the_newcomer_counts_as_room_when_targets_are_compared() -> None:
    # 0.6 with the newcomer against 0.5; 200 tokens of it in the cache are not enough, 1,100 are, unless they
    # are on its host.
    instances = [d_heavy("i1", 5_000), d_heavy("i2", 4_000)]
    assert choose_target(instances, 1_000, 0.95, STILL, {"i1": Prefix(200, 200)}) is instances[1]
    assert choose_target(instances, 1_500, 0.95, STILL, {"i1": Prefix(1_100, 1_100)}) is instances[0]
    assert choose_target(instances, 1_500, 0.95, STILL, {"i1": Prefix(0, 1_100)}) is instances[1]


def test_cached_blocks_save_room_only_where_they_are_in_use() -> None:
    full = d_heavy("i1", 9_000)
    assert choose_target([full], 1_000, 0.95, STILL, {"i1": Prefix(800, 800)}) is None
    assert choose_target([full], 1_000, 0.95, STILL, {"i1": Prefix(800, 800, claimed=800)}) is full


def test_degrading_reckons_with_what_the_helper_has_already() -> None:
    # 0.1 s of slack do not pay for a gap of 0.12 s; a helper that has half of its KV takes it in 0.06 s.
    request = decode("a", 12, first_at=0.044)
    here, ledger = residents(request)
    source, helper = d_heavy(kv=9_600), p_heavy(kv=1_000)
    assert here.slack(request, 1.0, 0) == pytest.approx(0.1)

    def choice(prefix: int) -> object:
        def match(_: Request) -> dict[str, Prefix]:
            return {"i0": Prefix(prefix, prefix)}

        return choose_degrade(source, here, ledger, [helper], 1.0, ByHand(0.12), STILL, Search(match))

    assert choice(0) is None
    assert choice(506) == (request, helper)
