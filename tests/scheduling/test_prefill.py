"""Algorithm 2 by hand-made numbers: TTFT is (queued + own tokens) x seconds per token, moves cost 0.1 s."""

from __future__ import annotations

from dataclasses import dataclass, field

from taichi_serve.instance import Instance
from taichi_serve.messages import Flowed, Stepped
from taichi_serve.request import Request
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.prefill import Placement, choose_prefill
from taichi_serve.sliders import Kind
from taichi_serve.slo import SLO

SLO_4S = SLO(ttft=4.0, tpot=0.07)


@dataclass
class ByHand:
    """Predictions from a table: seconds per prompt token of each instance, 0.1 s for every move."""

    per_token: dict[str, float]
    tpots: dict[str, float] = field(default_factory=dict)

    def ttft(self, instance: Instance, prompt_tokens: int) -> float:
        return (instance.queued_prefill_tokens + prompt_tokens) * self.per_token[instance.name]

    def tpot(self, instance: Instance, kv_tokens: int) -> float:
        return self.tpots.get(instance.name, 0.03)

    def move(self, source: Instance, target: Instance, kv_tokens: int) -> float:
        return 0.0 if source is target else 0.1

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
) -> Placement:
    # P-heavy instances prefill a token in 0.1 ms, D-heavy ones in 0.4 ms.
    by_hand = ByHand({i.name: 0.0001 if i.kind is Kind.P_HEAVY else 0.0004 for i in instances}, tpots or {})
    decoders = [i for i in instances if i.kind is Kind.D_HEAVY]
    return choose_prefill(request, now, instances, decoders, by_hand, SLO_4S, Policy(ttft_margin=margin))


def test_short_prompt_takes_the_d_heavy_instance_while_it_still_meets_ttft() -> None:
    # D-heavy: (4000 + 500) x 0.4 ms = 1.8 s, within half of 4 s; the idle P-heavy one stays free.
    placed = place(Request("a", 0.0, 500, 100), p_heavy("i0"), d_heavy("i1", queued=4000))
    assert placed.instance.name == "i1"
    assert not placed.hand_over


def test_long_prompt_takes_the_p_heavy_instance_and_hands_its_decode_over() -> None:
    # D-heavy: 6000 x 0.4 ms = 2.4 s, past the margin of 2 s. P-heavy: 0.6 s and 0.1 s for the move.
    placed = place(Request("a", 0.0, 6000, 100), p_heavy("i0"), d_heavy("i1"))
    assert placed.instance.name == "i0"
    assert placed.hand_over
    assert [round(f.ttft, 6) for f in placed.forecasts] == [0.7, 2.4]
    assert [f.feasible for f in placed.forecasts] == [True, False]


def test_fewest_queued_prompt_tokens_win_among_feasible_instances_of_a_kind() -> None:
    placed = place(Request("a", 0.0, 500, 100), d_heavy("i0", 900), d_heavy("i1", 300), d_heavy("i2", 600))
    assert placed.instance.name == "i1"


def test_equal_instances_are_taken_in_order() -> None:
    assert place(Request("a", 0.0, 500, 100), d_heavy("i0"), d_heavy("i1")).instance.name == "i0"


def test_lowest_predicted_ttft_is_taken_when_none_is_feasible() -> None:
    # P-heavy: 30000 x 0.1 ms + 0.1 s = 3.1 s; D-heavy: 7000 x 0.4 ms = 2.8 s; both past 2 s.
    placed = place(Request("a", 0.0, 6000, 100), p_heavy("i0", 24_000), d_heavy("i1", 1000))
    assert placed.instance.name == "i1"
    assert not any(f.feasible for f in placed.forecasts)


def test_time_already_waited_counts_against_the_margin() -> None:
    # 1.5 s waited + 1.8 s on the D-heavy one is past 2 s; the P-heavy one gives 1.5 + 0.05 + 0.1.
    placed = place(Request("a", 0.0, 500, 100), p_heavy("i0"), d_heavy("i1", 4000), now=1.5)
    assert placed.instance.name == "i0"


def test_margin_one_is_the_literal_algorithm() -> None:
    placed = place(Request("a", 0.0, 6000, 100), p_heavy("i0"), d_heavy("i1"), margin=1.0)
    assert placed.instance.name == "i1"


def test_request_that_cannot_move_may_use_the_whole_ttft_slo_for_a_d_heavy_instance() -> None:
    placed = place(Request("a", 0.0, 6000, 100, movable=False), p_heavy("i0"), d_heavy("i1"))
    assert placed.instance.name == "i1"
    placed = place(Request("a", 0.0, 12_000, 100, movable=False), p_heavy("i0"), d_heavy("i1"))
    assert placed.instance.name == "i0"
    assert not placed.hand_over


def test_instance_without_room_for_the_prompt_is_not_feasible() -> None:
    full = d_heavy("i1")
    full.kv_tokens = 94_600  # 94,600 + 500 of 100,000 is past 0.95
    placed = place(Request("a", 0.0, 500, 100), p_heavy("i0"), full)
    assert placed.instance.name == "i0"
    assert [(f.feasible, f.fits) for f in placed.forecasts] == [(True, True), (False, False)]


def test_when_none_is_feasible_one_with_room_comes_before_a_faster_one_without() -> None:
    full = p_heavy("i0")
    full.kv_tokens = 99_000
    assert place(Request("a", 0.0, 20_000, 100), full, d_heavy("i1")).instance.name == "i1"


def test_d_heavy_instance_whose_decodes_are_at_their_tpot_margin_gets_no_more_prompts() -> None:
    # 0.8 of 70 ms is 56 ms.
    instances, request = (p_heavy("i0"), d_heavy("i1")), Request("a", 0.0, 500, 100)
    assert place(request, *instances, tpots={"i1": 0.055}).instance.name == "i1"
    placed = place(request, *instances, tpots={"i1": 0.057})
    assert placed.instance.name == "i0"
    assert [(f.feasible, f.calm) for f in placed.forecasts] == [(True, True), (False, False)]
    # A P-heavy instance has no such margin: its decodes are few, and flow back when they are about to miss.
    assert place(request, *instances, tpots={"i0": 9.0, "i1": 0.057}).instance.name == "i0"


def test_request_of_one_token_is_over_where_it_prefills() -> None:
    placed = place(Request("a", 0.0, 6000, max_tokens=1), p_heavy("i0"), d_heavy("i1"))
    assert (placed.instance.name, placed.hand_over) == ("i0", False)
