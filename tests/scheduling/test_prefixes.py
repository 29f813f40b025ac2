"""What the global scheduler does with what it knows of prefix caches, event by event."""

from __future__ import annotations

from taichi_serve.latency.model import Roofline
from taichi_serve.latency.profile import Transfer
from taichi_serve.latency.profiled import Profiled
from taichi_serve.messages import (
    Arrived,
    Cached,
    Command,
    Decode,
    Finished,
    Flowed,
    Joined,
    Lost,
    Placed,
    Prefill,
    Prefilled,
    Refused,
    Stepped,
    Tier,
)
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

TWO_ALIKE = Sliders(0, 2, 0, 512)
BLOCK = 100
CHAIN = tuple(range(1, 11))  # ten blocks, a thousand tokens


def scheduler(
    sliders: Sliders = TWO_ALIKE,
    block_size: int = BLOCK,
    fetch: bool = False,
    bandwidth: float = 1e9,
    within: float = 10.0,
) -> GlobalScheduler:
    """A prompt token takes 1 ms, a token of KV has 1,000 bytes."""
    transfers = {(a, b): Transfer(a, b, 0.01, bandwidth) for a in Kind for b in Kind}
    predictor = Profiled(Roofline(launch=0.001, token=0.001), transfers, 1_000)
    capacities = {f"i{n}": 20_000 for n in range(sliders.instances)}
    policy = Policy(dwell=0.0, fetch=fetch, fetch_within=within)
    return GlobalScheduler(sliders, SLO(10.0, 10.0), predictor, policy, capacities, block_size)


def arrive(s: GlobalScheduler, name: str, tokens: int, blocks: tuple[int, ...], at: float = 0.0) -> Prefill:
    (command,) = s.on(Arrived(at, name, tokens, 100, blocks=blocks))
    assert isinstance(command, Prefill)
    return command


def cached(command: Command) -> list[int]:
    assert isinstance(command, Prefill)
    return [f.cached for f in command.forecasts]


def test_next_turn_goes_where_the_last_one_and_its_answer_are() -> None:
    s = scheduler()
    assert arrive(s, "a", 450, CHAIN[:4]).on == "i0"
    s.on(Cached(0.4, "i0", CHAIN[:4]))
    s.on(Prefilled(0.5, "a", 0, "i0"))
    assert arrive(s, "other", 50, ()).on == "i1"
    s.on(Cached(0.6, "i0", CHAIN[4:6]))
    s.on(Finished(0.7, "a", 200))
    turn = arrive(s, "b", 730, CHAIN[:7], at=5.0)
    assert (turn.on, cached(turn)) == ("i0", [600, 0])
    assert s.instances["i0"].queued_tokens == 130


def test_queue_holds_what_is_to_be_computed_and_the_engine_has_the_last_word() -> None:
    s = scheduler()
    s.on(Cached(0.0, "i0", CHAIN[:6]))
    arrive(s, "a", 730, CHAIN[:7])
    here = s.instances["i0"]
    assert (here.queued_tokens, here.queued_unused) == (130, 600)
    assert here.queued_attention == (730 * 731 - 600 * 601) // 2
    s.on(Stepped(0.1, "i0", 0.1, 100, 0, 700))
    assert (here.queued_prefill_tokens, here.queued_unused) == (30, 0)  # what was found is in its KV now
    s.on(Stepped(0.2, "i0", 0.1, 330, 0, 730))
    s.on(Prefilled(0.2, "a", 0, "i0", cached=300))
    assert (here.queued_tokens, here.queued_attention, here.progress_tokens) == (0, 0, 0)
    count = s.counters.prefixes["i0"]
    assert (count.predicted, count.actual, count.prompts) == (600, 300, 730)


def test_two_prompts_with_one_prefix_meet_before_it_is_computed() -> None:
    s = scheduler()
    assert arrive(s, "a", 950, CHAIN[:9]).on == "i0"
    assert arrive(s, "other", 180, ()).on == "i1"
    # Through after 950 + 250 tokens on i0 (what live requests have is counted in pieces of 200 here),
    # which i1 would have computed after 180 + 1,050.
    second = arrive(s, "b", 1_050, CHAIN)
    assert (second.on, cached(second)) == ("i0", [800, 0])
    # Of what is in use already nothing takes room again.
    assert s.instances["i0"].queued_unused == 0


def test_what_was_promised_ends_with_who_promised_it() -> None:
    s = scheduler()
    arrive(s, "a", 950, CHAIN[:9])
    s.on(Refused(0.1, "a", 0, "too long"))  # and placed anew on the same instance
    s.on(Finished(0.2, "a", 0))
    assert cached(arrive(s, "b", 1_050, CHAIN)) == [0, 0]


def test_lost_instance_has_nothing_and_comes_back_with_nothing() -> None:
    s = scheduler()
    s.on(Cached(0.0, "i0", CHAIN))
    s.on(Cached(0.0, "i0", CHAIN, tier=Tier.HOST))
    s.on(Lost(0.1, "i0", "killed"))
    s.on(Cached(0.2, "i0", CHAIN))  # said before it died, and heard after
    s.on(Joined(0.3, "i0", 20_000))
    assert cached(arrive(s, "a", 1_050, CHAIN)) == [0, 0]


def test_hand_over_goes_where_the_decode_finds_most_of_its_kv() -> None:
    sliders = Sliders(1, 2, 4096, 0)
    s = scheduler(sliders)
    s.on(Cached(0.0, "i2", CHAIN[:8]))
    first = arrive(s, "a", 1_050, CHAIN)
    assert (first.on, first.hand_over) == ("i0", True)
    (decode,) = s.on(Prefilled(0.5, "a", 0, "i0", held=True))
    assert isinstance(decode, Decode)
    assert decode.on == "i2"
    s.on(Flowed(0.6, "a", 1, "i2", 2, 250, 0.1))
    # The second has the whole prompt in use there, and needs no room for it.
    arrive(s, "b", 1_050, CHAIN)
    (decode,) = s.on(Prefilled(0.7, "b", 0, "i0", held=True))
    assert isinstance(decode, Decode)
    assert (decode.on, s.instances["i2"].reserved_tokens) == ("i2", 51 + 8)


def test_what_is_on_the_host_of_a_target_alone_is_copied_and_does_not_draw_a_decode_there() -> None:
    s = scheduler(Sliders(1, 2, 4096, 0))
    s.on(Cached(0.0, "i2", CHAIN, tier=Tier.HOST))
    arrive(s, "a", 1_050, CHAIN)
    (decode,) = s.on(Prefilled(0.5, "a", 0, "i0", held=True))
    assert isinstance(decode, Decode)
    assert decode.on == "i1"  # the first of equals


def busy(s: GlobalScheduler, tokens: int) -> None:
    """i0 has so many tokens queued by somebody else."""
    s.instances["i1"].silent = True
    arrive(s, "before", tokens, ())
    s.instances["i1"].silent = False


def test_prefix_is_fetched_from_a_busy_holder() -> None:
    s = scheduler(fetch=True)
    s.on(Cached(0.0, "i0", CHAIN))
    busy(s, 8_000)
    fetched = arrive(s, "a", 1_050, CHAIN)
    assert (fetched.on, fetched.prefix_from, fetched.prefix_tokens) == ("i1", "i0", 1_000)
    assert cached(fetched) == [1_000, 1_000]
    assert s.instances["i1"].queued_tokens == 50
    # 10 ms of latency and 1 MB at 1 GB/s, 51 ms for the rest.
    assert abs(fetched.forecasts[1].ttft - 0.062) < 1e-9


def test_nothing_is_fetched_over_a_slow_link_or_without_leave() -> None:
    for s in (scheduler(fetch=True, bandwidth=1e5), scheduler(fetch=False)):
        s.on(Cached(0.0, "i0", CHAIN))
        busy(s, 8_000)
        computed = arrive(s, "a", 1_050, CHAIN)
        assert (computed.on, computed.prefix_from, cached(computed)) == ("i1", None, [1_000, 0])


def test_prefix_is_fetched_to_the_host_that_has_it_where_the_way_to_another_is_dear() -> None:
    # Copied in 10 ms and 1 MB at 4 MB/s, 0.26 s, or computed in 1.05 s; over the dear link in 2.2 s.
    for gap, on in ((0.01, "i1"), (0.10, "i2")):
        s = scheduler(Sliders(0, 3, 0, 512), fetch=True, bandwidth=4e6)
        s.on(Cached(0.0, "i0", CHAIN))
        for name, host in (("i0", "a"), ("i1", "b"), ("i2", "a")):
            s.on(Placed(0.0, name, host))
        holder, far, near = s.instances.values()
        s.links.flowed(holder, near, Flowed(0.0, "x", 1, "i2", 5, 488, 0.01))
        s.links.flowed(holder, far, Flowed(0.0, "y", 1, "i1", 5, 488, gap))
        far.silent = near.silent = True
        arrive(s, "before", 8_000, ())
        far.silent = near.silent = False
        fetched = arrive(s, "a", 1_050, CHAIN)
        assert (fetched.on, fetched.prefix_from) == (on, "i0")


def test_nothing_is_fetched_from_who_does_not_answer() -> None:
    s = scheduler(fetch=True)
    s.on(Cached(0.0, "i0", CHAIN))
    busy(s, 8_000)
    s.instances["i0"].silent = True
    assert arrive(s, "a", 1_050, CHAIN).prefix_from is None


def test_without_a_block_size_hashes_mean_nothing() -> None:
    s = scheduler(block_size=0)
    s.on(Cached(0.0, "i1", CHAIN))
    assert cached(arrive(s, "a", 1_050, CHAIN)) == [0, 0]


def test_prefix_that_would_come_after_the_cluster_gave_it_up_is_not_fetched() -> None:
    # On i1 2,000 tokens are queued, 2 s; on i0, which has the prefix, 8,000.
    for within, fetched in ((10.0, "i0"), (1.0, None)):
        s = scheduler(fetch=True, within=within)
        s.on(Cached(0.0, "i0", CHAIN))
        busy(s, 8_000)
        assert arrive(s, "queued", 2_000, ()).on == "i1"
        turn = arrive(s, "a", 1_050, CHAIN)
        assert (turn.on, turn.prefix_from) == ("i1", fetched)


def test_what_one_holder_is_asked_for_comes_one_after_the_other() -> None:
    # Copied in 10 ms and 1 MB at 1.5 MB/s, 0.68 s, or computed in 1.05 s: sooner than behind another copy.
    s = scheduler(Sliders(0, 3, 0, 512), fetch=True, bandwidth=1.5e6)
    other, third = (tuple(block + more for block in CHAIN) for more in (100, 200))
    s.on(Cached(0.0, "i0", (*CHAIN, *other, *third)))
    s.instances["i2"].silent = True
    busy(s, 8_000)
    s.instances["i2"].silent = False
    assert arrive(s, "a", 1_050, CHAIN).prefix_from == "i0"
    assert arrive(s, "b", 1_050, other).prefix_from is None
    assert arrive(s, "c", 1_050, third, at=0.7).prefix_from == "i0"


def test_of_two_holders_the_one_that_has_lent_less_lends() -> None:
    s = scheduler(Sliders(0, 3, 0, 512), fetch=True, bandwidth=1.5e6)
    other = tuple(block + 100 for block in CHAIN)
    for holder in ("i0", "i1"):
        s.on(Cached(0.0, holder, (*CHAIN, *other)))
        s.instances["i2"].silent = True
        s.instances["i1" if holder == "i0" else "i0"].silent = True
        arrive(s, f"before {holder}", 8_000, ())
        for instance in s.instances.values():
            instance.silent = False
    assert arrive(s, "a", 1_050, CHAIN).prefix_from == "i0"
    assert arrive(s, "b", 1_050, other).prefix_from == "i1"


def test_prompt_that_is_late_all_the_same_is_late_by_less_with_a_fetch() -> None:
    # None is within 5 s: i0, which has the prefix, has 8,000 tokens queued, and i1 6,000.
    s = scheduler(fetch=True)
    s.on(Cached(0.0, "i0", CHAIN))
    busy(s, 8_000)
    s.instances["i0"].silent = True
    arrive(s, "queued", 6_000, ())
    s.instances["i0"].silent = False
    late = arrive(s, "a", 1_050, CHAIN)
    assert (late.on, late.prefix_from) == ("i1", "i0")
    assert not any(forecast.feasible for forecast in late.forecasts)
