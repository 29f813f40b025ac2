"""Prefix caches of engines in miniature: small runs whose log is known by hand. A block has 16 tokens, and
every step takes a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from taichi_serve.cluster.base import run
from taichi_serve.cluster.simulated import Call, EngineShape, Link, SimulatedCluster
from taichi_serve.cluster.simulated.cache import PrefixCache
from taichi_serve.latency.curve import StepCurve
from taichi_serve.messages import (
    Abort,
    Arrived,
    Cached,
    Command,
    Decode,
    Event,
    Finished,
    Flowed,
    Lost,
    Move,
    Outcome,
    Prefill,
    Prefilled,
    Stepped,
    Tier,
)
from taichi_serve.sliders import Sliders

SECOND = StepCurve(((0, 1.0), (1000, 1.0)), 0.0, 0.0, 0.0)
ONE, TWO = Sliders(0, 1, 0, 100), Sliders(0, 2, 0, 100)
CHAIN = tuple(range(1, 31))


@dataclass
class Script:
    """Places every request where it is written, with the prefix that is to be fetched."""

    where: dict[str, Prefill]
    then: dict[str, Command] = field(default_factory=dict)  # after the first token
    log: list[Event] = field(default_factory=list)

    def on(self, event: Event) -> Sequence[Command]:
        self.log.append(event)
        if isinstance(event, Arrived):
            return [self.where[event.request]]
        if isinstance(event, Prefilled) and event.request in self.then:
            return [self.then[event.request]]
        return []


def cluster(
    *calls: Call, sliders: Sliders = ONE, kv: int = 1600, host: int = 0, lost: Sequence[Lost] = ()
) -> SimulatedCluster:
    """KV moves at 1,000 tokens/s after half a second, and from the host at 100 tokens/s."""
    link = Link(bytes_per_token=1.0, bandwidth=1000.0, latency=0.5)
    return SimulatedCluster(sliders, [SECOND], EngineShape(kv, 256, 16, host, 100.0), link, calls, lost, kv)


def played(made: SimulatedCluster, *prefills: Prefill, then: dict[str, Command] | None = None) -> list[Event]:
    script = Script({p.request: p for p in prefills}, then or {})
    run(script, made)
    assert not made.jobs
    for engine in made.engines.values():
        if engine.alive:
            assert engine.residents.free == engine.residents.blocks
            assert not engine.cache.users
    return script.log


def on(request: str, instance: str = "i0", *, hand_over: bool = False) -> Prefill:
    return Prefill(request, 0, instance, hand_over)


def cached(log: list[Event]) -> dict[str, int]:
    return {e.request: e.cached for e in log if isinstance(e, Prefilled)}


def test_next_turn_finds_prompt_and_answer_of_the_last() -> None:
    second = Call(7.0, 120, 2, blocks=CHAIN[:7])
    log = played(cluster(Call(0.0, 60, 5, blocks=CHAIN[:4], then=second)), on("r0"), on("r1"))
    # 64 tokens have KV when the first is over at 5: prompt, and answer but for its last token. 7 s later:
    assert Arrived(12.0, "r1", 120, 1480, blocks=CHAIN[:7]) in log
    assert cached(log) == {"r0": 0, "r1": 64}
    assert Stepped(13.0, "i0", 1.0, 56, 0, 128) in log


def test_what_is_stored_is_told_before_the_step() -> None:
    log = played(cluster(Call(0.0, 150, 1, blocks=CHAIN[:9])), on("r0"))
    # The second chunk is planned when the first one begins, and so told with it.
    assert log[1:4] == [
        Cached(1.0, "i0", CHAIN[:9]), Stepped(1.0, "i0", 1.0, 100, 0, 160), Stepped(2.0, "i0", 1.0, 50, 0, 0),
    ]  # fmt: skip


def test_prompt_that_is_cached_as_a_whole_computes_its_last_block() -> None:
    calls = Call(0.0, 64, 1, blocks=CHAIN[:4]), Call(5.0, 64, 1, blocks=CHAIN[:4])
    log = played(cluster(*calls), on("r0"), on("r1"))
    assert cached(log)["r1"] == 48
    assert Stepped(6.0, "i0", 1.0, 16, 0, 0) in log


def test_two_prompts_share_blocks_in_use_and_count_them_once() -> None:
    calls = Call(0.0, 80, 9, blocks=CHAIN[:5]), Call(2.5, 80, 1, blocks=CHAIN[:5])
    made = cluster(*calls, kv=128)
    log = played(made, on("r0"), on("r1"))
    # Room for 8 blocks: 6 of the first, which decodes; the second needs one more than it shares.
    assert cached(log)["r1"] == 64
    assert max(e.kv_tokens for e in log if isinstance(e, Stepped)) == 7 * 16
    assert not any(e.missed for e in log if isinstance(e, Stepped))


def test_longest_unused_goes_first_and_a_prefix_outlives_its_tail() -> None:
    old, new = CHAIN[:4], CHAIN[10:14]
    calls = [
        Call(0.0, 64, 1, blocks=old), Call(5.0, 64, 1, blocks=new), Call(10.0, 32, 1),
        Call(15.0, 64, 1, blocks=(*old[:2], 98, 99)), Call(20.0, 64, 1, blocks=new),
    ]  # fmt: skip
    log = played(cluster(*calls, kv=144), *(on(f"r{n}") for n in range(5)))
    # Of 9 blocks one is blank when the third comes and needs two: the tail of the first goes.
    assert next(e for e in log if isinstance(e, Cached) and e.removed).removed == (4,)
    assert cached(log)["r3"] == 32
    # The fourth takes two more: the third of the first, and not those of the second, used later.
    assert cached(log)["r4"] == 48


def test_what_the_device_evicted_is_read_from_the_host() -> None:
    calls = Call(0.0, 160, 1, blocks=CHAIN[:10]), Call(5.0, 160, 1), Call(10.0, 170, 1, blocks=CHAIN[:10])
    log = played(cluster(*calls, kv=176, host=1600), *(on(f"r{n}") for n in range(3)))
    told = [e for e in log if isinstance(e, Cached)]
    assert {e.tier for e in told} == {Tier.DEVICE, Tier.HOST}
    assert any(e.removed for e in told if e.tier is Tier.DEVICE)
    assert not any(e.removed for e in told if e.tier is Tier.HOST)
    # One block is still on the device; nine are read in 1.44 s, and then the ten tokens that are left.
    assert [e for e in log if isinstance(e, Prefilled)][2] == Prefilled(12.44, "r2", 0, "i0", 160)


def test_host_forgets_what_was_longest_unused() -> None:
    cache = PrefixCache(host_blocks=3)
    for block in (1, 2, 3):
        cache.store(block)
    cache.give([1, 2, 3])
    cache.take([1])
    cache.store(4)
    assert set(cache.host) == {1, 2, 4}  # 3 was the tail of the first


def test_prefix_is_fetched_from_another_instance_while_others_are_computed() -> None:
    calls = Call(0.0, 160, 1, blocks=CHAIN[:10]), Call(5.0, 200, 1), Call(5.0, 170, 1, blocks=CHAIN[:10])
    fetch = Prefill("r2", 0, "i1", prefix_from="i0", prefix_tokens=160)
    log = played(cluster(*calls, sliders=TWO), on("r0"), on("r1", "i1"), fetch)
    # 160 tokens take 0.66 s, while r1 is computed until 7; then the ten that are left.
    assert Prefilled(7.0, "r1", 0, "i1") in log
    assert Prefilled(8.0, "r2", 0, "i1", 160, fetched=160) in log
    assert Cached(6.0, "i1", CHAIN[:10]) in log


def test_only_what_is_missing_is_fetched() -> None:
    calls = (
        Call(0.0, 160, 1, blocks=CHAIN[:10]), Call(0.0, 64, 1, blocks=(*CHAIN[:4],)),
        Call(5.0, 170, 1, blocks=CHAIN[:10]),
    )  # fmt: skip
    fetch = Prefill("r2", 0, "i1", prefix_from="i0", prefix_tokens=160)
    log = played(cluster(*calls, sliders=TWO), on("r0"), on("r1", "i1"), fetch)
    (got,) = [e for e in log if isinstance(e, Prefilled) and e.request == "r2"]
    assert (got.cached, got.fetched) == (160, 96)
    assert got.at == pytest.approx(5.0 + 0.5 + 0.096 + 1.0)


def test_prefix_whose_holder_is_lost_is_computed() -> None:
    calls = Call(0.0, 160, 1, blocks=CHAIN[:10]), Call(5.0, 90, 1, blocks=CHAIN[:5])
    fetch = Prefill("r1", 0, "i1", prefix_from="i0", prefix_tokens=80)
    made = cluster(*calls, sliders=TWO, lost=[Lost(5.2, "i0", "killed")])
    log = played(made, on("r0"), fetch)
    assert Prefilled(6.2, "r1", 0, "i1") in log


def test_blocks_that_are_fetched_stay_at_their_holder_until_they_are_there() -> None:
    calls = Call(0.0, 160, 1, blocks=CHAIN[:10]), Call(5.0, 170, 1, blocks=CHAIN[:10]), Call(5.0, 160, 1)
    fetch = Prefill("r1", 0, "i1", prefix_from="i0", prefix_tokens=160)
    log = played(cluster(*calls, sliders=TWO, kv=176), on("r0"), fetch, on("r2", "i0"))
    # Eleven blocks, ten of which are read until 5.66: r2 has to wait for them.
    assert Prefilled(6.66, "r1", 0, "i1", 160, fetched=160) in log
    assert [e.at for e in log if isinstance(e, Prefilled) and e.request == "r2"] == [pytest.approx(7.66)]


def test_move_copies_only_what_its_target_lacks() -> None:
    calls = Call(0.0, 64, 1, blocks=CHAIN[:4]), Call(5.0, 100, 3, blocks=CHAIN[:6])
    hand_over = {"r1": Decode("r1", 1, "i0", Move.HAND_OVER)}
    log = played(cluster(*calls, sliders=TWO), on("r0"), on("r1", "i1", hand_over=True), then=hand_over)
    flowed = next(e for e in log if isinstance(e, Flowed))
    assert (flowed.kv_tokens, flowed.reused) == (36, 100)
    assert flowed.gap == pytest.approx(0.5 + 0.036 + 1.0)


def test_next_turn_does_not_come_after_a_request_that_was_cancelled() -> None:
    abort = {"r0": Abort("r0", Outcome.CANCELLED, "the client left")}
    made = cluster(Call(0.0, 60, 5, then=Call(1.0, 60, 5)))
    log = played(made, on("r0"), then=abort)
    assert [type(e) for e in log].count(Arrived) == 1
    assert isinstance(log[-1], (Finished, Stepped))


def test_prompts_that_got_their_blocks_early_give_them_back_when_nothing_else_goes_on() -> None:
    # r2 has eleven blocks of i1 for what it fetches, and waits behind r1, which needs all twelve.
    calls = Call(0.0, 160, 1, blocks=CHAIN[:10]), Call(5.0, 190, 1), Call(5.0, 170, 1, blocks=CHAIN[:10])
    fetch = Prefill("r2", 0, "i1", prefix_from="i0", prefix_tokens=160)
    made = cluster(*calls, sliders=TWO, kv=192)
    made.agenda.still(made.engines["i1"], on=True)
    log = crowded(made, on("r0"), on("r1", "i1"), fetch)
    assert {e.request for e in log if isinstance(e, Finished)} == {"r0", "r1", "r2"}


def crowded(made: SimulatedCluster, *prefills: Prefill) -> list[Event]:
    """i1 stands still until all are there, so that r2 has its blocks before r1 begins."""
    script = Script({p.request: p for p in prefills})
    for event in made.facts():
        for command in script.on(event):
            made.send(command)
        if isinstance(event, Arrived) and event.request == "r2":
            made.agenda.still(made.engines["i1"], on=False)
    assert not made.jobs
    return script.log
