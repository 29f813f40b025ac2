"""Algorithm 2 by hand-made numbers: TTFT is (queued + own tokens) x seconds per token, moves cost 0.1 s."""

from __future__ import annotations

from dataclasses import dataclass, field

from taichi_serve.instance import Instance
from taichi_serve.messages import Flowed, Stepped
from taichi_serve.request import Request
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.prefill import UNKNOWN, Known, Placement, choose_prefill
from taichi_serve.scheduling.residency import Prefix
from taichi_serve.sliders import Kind
from taichi_serve.slo import SLO

SLO_4S = SLO(ttft=4.0, tpot=0.07)


@dataclass
class ByHand:
    """Predictions from a table: seconds per prompt token of each instance, 0.1 s for every move."""

    per_token: dict[str, float]
    tpots: dict[str, float] = field(default_factory=dict)
    per_fetched: float = 0.00001

    def ttft(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        return (instance.queued_prefill_tokens + prompt_tokens - cached) * self.per_token[instance.name]

    def work(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        return (prompt_tokens - cached) * self.per_token[instance.name]

    def since(self, instance: Instance, elapsed: float) -> float:
        return 0.0

    def tpot(self, instance: Instance, kv_tokens: int) -> float:
        return self.tpots.get(instance.name, 0.03)

    def move(self, source: Instance, target: Instance, kv_tokens: int, held: int = 0) -> float:
        return 0.0 if source is target else 0.1

    def fetch(self, source: Instance, target: Instance, kv_tokens: int) -> float:
        return kv_tokens * self.per_fetched

    def stepped(self, instance: Instance, step: Stepped) -> None: ...

    def flowed(self, source: Instance, target: Instance, move: Flowed) -> None: ...


def p_heavy(name: str, queued: int = 0) -> Instance:
    return Instance(name, Kind.P_HEAVY, 1024, 100_000, queued_tokens=queued)


def d_heavy(name: str, queued: int = 0) -> Instance:
    return Instance(name, Kind.D_HEAVY, 256, 100_000, queued_tokens=queued)


def place(
    request: Request,
    *instances: Instance,
    now: float = 0.0,
    margin: float = 0.5,
    tpots: dict[str, float] | None = None,
    known: Known = UNKNOWN,
    beside: SLO | None = None,
) -> Placement:
    # P-heavy instances prefill a token in 0.1 ms, D-heavy ones in 0.4 ms.
    by_hand = ByHand({i.name: 0.0001 if i.kind is Kind.P_HEAVY else 0.0004 for i in instances}, tpots or {})
    decoders = [i for i in instances if i.kind is Kind.D_HEAVY]
    policy = Policy(ttft_margin=margin)
    return choose_prefill(request, now, instances, decoders, by_hand, policy, known, beside)


def test_short_prompt_takes_the_d_heavy_instance_while_it_still_meets_ttft() -> None:
    # D-heavy: (4000 + 500) x 0.4 ms = 1.8 s, within half of 4 s; the idle P-heavy one stays free.
    placed = place(Request("a", 0.0, 500, 100, slo=SLO_4S), p_heavy("i0"), d_heavy("i1", queued=4000))
    assert placed.instance.name == "i1"
    assert not placed.hand_over


def test_long_prompt_takes_the_p_heavy_instance_and_hands_its_decode_over() -> None:
    # D-heavy: 6000 x 0.4 ms = 2.4 s, past the margin of 2 s. P-heavy: 0.6 s and 0.1 s for the move.
    placed = place(Request("a", 0.0, 6000, 100, slo=SLO_4S), p_heavy("i0"), d_heavy("i1"))
    assert placed.instance.name == "i0"
    assert placed.hand_over
    assert [round(f.ttft, 6) for f in placed.forecasts] == [0.7, 2.4]
    assert [f.feasible for f in placed.forecasts] == [True, False]


def test_fewest_queued_prompt_tokens_win_among_feasible_instances_of_a_kind() -> None:
    placed = place(
        Request("a", 0.0, 500, 100, slo=SLO_4S), d_heavy("i0", 900), d_heavy("i1", 300), d_heavy("i2", 600)
    )
    assert placed.instance.name == "i1"


def test_equal_instances_are_taken_in_order() -> None:
    assert place(Request("a", 0.0, 500, 100, slo=SLO_4S), d_heavy("i0"), d_heavy("i1")).instance.name == "i0"


def test_lowest_predicted_ttft_is_taken_when_none_is_feasible() -> None:
    # P-heavy: 30000 x 0.1 ms + 0.1 s = 3.1 s; D-heavy: 7000 x 0.4 ms = 2.8 s; both past 2 s.
    placed = place(Request("a", 0.0, 6000, 100, slo=SLO_4S), p_heavy("i0", 24_000), d_heavy("i1", 1000))
    assert placed.instance.name == "i1"
    assert not any(f.feasible for f in placed.forecasts)


def test_time_already_waited_counts_against_the_margin() -> None:
    # 1.5 s waited + 1.8 s on the D-heavy one is past 2 s; the P-heavy one gives 1.5 + 0.05 + 0.1.
    placed = place(Request("a", 0.0, 500, 100, slo=SLO_4S), p_heavy("i0"), d_heavy("i1", 4000), now=1.5)
    assert placed.instance.name == "i0"


def test_margin_one_is_the_literal_algorithm() -> None:
    placed = place(Request("a", 0.0, 6000, 100, slo=SLO_4S), p_heavy("i0"), d_heavy("i1"), margin=1.0)
    assert placed.instance.name == "i1"


def test_request_that_cannot_move_may_use_the_whole_ttft_slo_for_a_d_heavy_instance() -> None:
    placed = place(Request("a", 0.0, 6000, 100, slo=SLO_4S, movable=False), p_heavy("i0"), d_heavy("i1"))
    assert placed.instance.name == "i1"
    placed = place(Request("a", 0.0, 12_000, 100, slo=SLO_4S, movable=False), p_heavy("i0"), d_heavy("i1"))
    assert placed.instance.name == "i0"
    assert not placed.hand_over


def test_instance_without_room_for_the_prompt_is_not_feasible() -> None:
    full = d_heavy("i1")
    full.kv_tokens = 94_600  # 94,600 + 500 of 100,000 is past 0.95
    placed = place(Request("a", 0.0, 500, 100, slo=SLO_4S), p_heavy("i0"), full)
    assert placed.instance.name == "i0"
    assert [(f.feasible, f.fits) for f in placed.forecasts] == [(True, True), (False, False)]


def test_when_none_is_feasible_one_with_room_comes_before_a_faster_one_without() -> None:
    full = p_heavy("i0")
    full.kv_tokens = 99_000
    assert place(Request("a", 0.0, 20_000, 100, slo=SLO_4S), full, d_heavy("i1")).instance.name == "i1"


def test_d_heavy_instance_whose_decodes_are_at_their_tpot_margin_gets_no_more_prompts() -> None:
    # 0.8 of 70 ms is 56 ms.
    instances, request = (p_heavy("i0"), d_heavy("i1")), Request("a", 0.0, 500, 100, slo=SLO_4S)
    assert place(request, *instances, tpots={"i1": 0.055}).instance.name == "i1"
    placed = place(request, *instances, tpots={"i1": 0.057})
    assert placed.instance.name == "i0"
    assert [(f.feasible, f.calm) for f in placed.forecasts] == [(True, True), (False, False)]
    # A P-heavy instance has no such margin: its decodes are few, and flow back when they are about to miss.
    assert place(request, *instances, tpots={"i0": 9.0, "i1": 0.057}).instance.name == "i0"


def test_request_of_one_token_is_over_where_it_prefills() -> None:
    placed = place(Request("a", 0.0, 6000, max_tokens=1, slo=SLO_4S), p_heavy("i0"), d_heavy("i1"))
    assert (placed.instance.name, placed.hand_over) == ("i0", False)


# --------------------------------------------------------------------------------------------- prefixes


def cached(**tokens: int) -> Known:
    return Known({name: Prefix(n, n) for name, n in tokens.items()})


def test_long_conversation_with_a_short_new_turn_is_a_short_prompt() -> None:
    # 500 new tokens x 0.4 ms = 0.2 s on the D-heavy instance that has the rest, which would have taken 2.4 s.
    placed = place(
        Request("a", 0.0, 6000, 100, slo=SLO_4S), p_heavy("i0"), d_heavy("i1"), known=cached(i1=5500)
    )
    assert (placed.instance.name, placed.hand_over, placed.cached) == ("i1", False, 5500)
    assert [round(f.ttft, 6) for f in placed.forecasts] == [0.7, 0.2]
    assert [f.cached for f in placed.forecasts] == [0, 5500]
    assert placed.why == "D-heavy within 2 s, fewest prompt tokens to compute; 5500 tokens are cached there"


def test_what_is_cached_is_weighed_against_the_queue_token_for_token() -> None:
    request, holder = Request("a", 0.0, 2000, 100, slo=SLO_4S), cached(i0=1600)
    assert place(request, d_heavy("i0", 1500), d_heavy("i1"), known=holder).instance.name == "i0"
    # With 1,700 queued there it would be through later than where it is computed as a whole.
    assert place(request, d_heavy("i0", 1700), d_heavy("i1"), known=holder).instance.name == "i1"


def test_longer_match_breaks_a_tie() -> None:
    request = Request("a", 0.0, 2000, 100, slo=SLO_4S)
    equal = place(request, d_heavy("i0", 100), d_heavy("i1", 500), known=cached(i0=400, i1=800))
    assert equal.instance.name == "i1"


def test_a_prefix_that_will_be_computed_before_counts_as_cached() -> None:
    known = Known({"i1": Prefix(claimed=1600)})
    placed = place(Request("a", 0.0, 2000, 100, slo=SLO_4S), d_heavy("i0"), d_heavy("i1", 1000), known=known)
    assert (placed.instance.name, placed.cached, placed.used) == ("i1", 1600, 1600)


def test_cached_blocks_that_nobody_uses_take_room() -> None:
    full = d_heavy("i1")
    full.kv_tokens = 94_600  # 94,600 + 500 of 100,000 is past 0.95, however much of the 500 is cached
    request = Request("a", 0.0, 500, 100, slo=SLO_4S)
    placed = place(request, p_heavy("i0"), full, known=cached(i1=400))
    assert [f.fits for f in placed.forecasts] == [True, False]
    in_use = Known({"i1": Prefix(400, 400, claimed=400)})
    assert [f.fits for f in place(request, p_heavy("i0"), full, known=in_use).forecasts] == [True, True]


def test_hand_over_is_priced_with_what_the_decoder_has() -> None:
    class ByLength(ByHand):
        def move(self, source: Instance, target: Instance, kv_tokens: int, held: int = 0) -> float:
            return (kv_tokens - held) * 0.001

    empty, holder = d_heavy("i1"), d_heavy("i2")
    empty.chunk = holder.chunk = 0
    request, by_length = Request("a", 0.0, 1000, 100, slo=SLO_4S), ByLength({"i0": 0.0001})

    def ttft(known: Known) -> float:
        placed = choose_prefill(request, 0.0, [p_heavy("i0")], [empty, holder], by_length, Policy(), known)
        return placed.forecasts[0].ttft

    assert ttft(UNKNOWN) == 0.1 + 1.0
    assert ttft(cached(i2=800)) == 0.1 + 0.2


# ------------------------------------------------------------------------------------------------ fetch


def test_prefix_is_fetched_where_the_prompt_is_better_placed() -> None:
    # The holder has 10,000 tokens queued: 4.2 s. Fetching 5,500 tokens takes 55 ms, the other 500 200 ms.
    holder = d_heavy("i0", 10_000)
    known = Known({"i0": Prefix(5500, 5500)}, holder, 5500)
    placed = place(Request("a", 0.0, 6000, 100, slo=SLO_4S), holder, d_heavy("i1"), known=known)
    assert (placed.instance.name, placed.cached, placed.lender) == ("i1", 5500, holder)
    assert round(placed.ttft, 6) == 0.255
    assert placed.why.endswith("; fetches the KV of 5500 tokens from i0")


def test_only_what_is_missing_is_fetched() -> None:
    holder = d_heavy("i0", 10_000)
    known = Known({"i0": Prefix(5500, 5500), "i1": Prefix(1500, 1500)}, holder, 5500)
    placed = place(Request("a", 0.0, 6000, 100, slo=SLO_4S), holder, d_heavy("i1"), known=known)
    assert round(placed.ttft, 6) == 0.24


def test_copying_beside_the_queue_delays_nothing() -> None:
    # 1,000 queued tokens take 0.4 s; the copy is there after 55 ms.
    holder, other = d_heavy("i0", 10_000), d_heavy("i1", 1000)
    other.queued_requests = 1
    known = Known({"i0": Prefix(5500, 5500)}, holder, 5500)
    placed = place(Request("a", 0.0, 6000, 100, slo=SLO_4S), holder, other, known=known)
    assert (placed.lender, round(placed.ttft, 6)) == (holder, 0.6)


def test_nothing_is_fetched_where_computing_is_faster_or_the_holder_is_the_place() -> None:
    holder = d_heavy("i0")
    known = Known({"i0": Prefix(5500, 5500)}, holder, 5500)
    assert (
        place(Request("a", 0.0, 6000, 100, slo=SLO_4S), holder, d_heavy("i1", 100), known=known).lender
        is None
    )
    busy = d_heavy("i0", 10_000)
    slow = ByHand({"i0": 0.0004, "i1": 0.0004}, per_fetched=0.0005)
    known = Known({"i0": Prefix(5500, 5500)}, busy, 5500)
    request = Request("a", 0.0, 6000, 100, slo=SLO_4S)
    placed = choose_prefill(request, 0.0, [busy, d_heavy("i1")], [], slow, Policy(), known)
    assert (placed.instance.name, placed.lender, placed.cached) == ("i1", None, 0)


# ------------------------------------------------------------------------------------ SLOs of other requests

LOOSE, STRICT = SLO(ttft=40.0, tpot=0.5), SLO(ttft=4.0, tpot=0.07)


def loose(prompt: int = 500) -> Request:
    return Request("a", 0.0, prompt, 100, LOOSE)


def test_a_loose_request_prefers_the_p_heavy_instance_and_decodes_there() -> None:
    # 0.3 s a token there is within 0.8 of 500 ms; a strict one leaves that instance to long prompts.
    instances, tpots = (p_heavy("i0"), d_heavy("i1")), {"i0": 0.3}
    placed = place(loose(), *instances, tpots=tpots, beside=STRICT)
    assert (placed.instance.name, placed.hand_over) == ("i0", False)
    strict = place(Request("a", 0.0, 500, 100, STRICT), *instances, tpots=tpots, beside=STRICT)
    assert (strict.instance.name, strict.hand_over) == ("i1", False)


def test_it_hands_its_decode_over_where_that_would_be_too_slow() -> None:
    placed = place(loose(), p_heavy("i0"), d_heavy("i1"), tpots={"i0": 0.41}, beside=STRICT)
    assert placed.instance.name == "i1"
    placed = place(loose(20_000), p_heavy("i0"), d_heavy("i1", 90_000), tpots={"i0": 0.41}, beside=STRICT)
    assert (placed.instance.name, placed.hand_over) == ("i0", True)


def test_among_requests_with_one_slo_nobody_is_loose() -> None:
    placed = place(loose(), p_heavy("i0"), d_heavy("i1"), tpots={"i0": 0.3}, beside=LOOSE)
    assert placed.instance.name == "i1"


def test_queues_beyond_the_strictest_ttft_are_for_when_there_is_no_shorter_one() -> None:
    # i0 would take 2.45 s with the move: within 20 s, not within half of the strictest 4 s. i1 takes 1.4 s.
    longer, shorter = p_heavy("i0", 23_000), d_heavy("i1", 3000)
    placed = place(loose(), longer, shorter, tpots={"i0": 0.3}, beside=STRICT)
    assert placed.instance.name == "i1"
    # Both are beyond it: then its own SLO counts, and the P-heavy one comes first again.
    placed = place(loose(), longer, d_heavy("i1", 9000), tpots={"i0": 0.3}, beside=STRICT)
    assert placed.instance.name == "i0"


def test_decodes_of_a_d_heavy_instance_keep_the_strictest_tpot_whoever_comes() -> None:
    # 60 ms is above 0.8 of 70 ms, and far below the newcomer's own 500.
    busy = {"i0": 0.45, "i1": 0.06}
    placed = place(loose(), p_heavy("i0"), d_heavy("i1"), tpots=busy, beside=STRICT)
    assert [f.calm for f in placed.forecasts] == [True, False]
    assert placed.instance.name == "i0"


def test_without_degrading_no_decode_stays_on_a_p_heavy_instance() -> None:
    by_hand, here = ByHand({"i0": 0.0001, "i1": 0.0004}, {"i0": 0.3}), [p_heavy("i0"), d_heavy("i1")]
    placed = choose_prefill(loose(), 0.0, here, here[1:], by_hand, Policy(watermark=1.0), UNKNOWN, STRICT)
    assert placed.instance.name == "i1"
