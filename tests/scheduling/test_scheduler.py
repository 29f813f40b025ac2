"""The global scheduler, event by event: what it decides, and that its ledger comes out even."""

from __future__ import annotations

from typing import get_args

import pytest

from taichi_serve.latency.predict import Learned
from taichi_serve.messages import (
    Abort,
    Ahead,
    Arrived,
    Asked,
    Cancelled,
    Command,
    Decode,
    Drained,
    Event,
    Finished,
    Flow,
    Flowed,
    Lost,
    Move,
    Outcome,
    Prefill,
    Prefilled,
    Refused,
    SetChunk,
    Slid,
    Stepped,
)
from taichi_serve.request import State
from taichi_serve.scheduling.counters import Counters
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

HYBRID = Sliders(p_heavy=1, d_heavy=1, p_chunk=1024, d_chunk=256)
DISAGGREGATION = Sliders(p_heavy=1, d_heavy=1, p_chunk=2048, d_chunk=0)


def scheduler(
    sliders: Sliders = HYBRID, policy: Policy | None = None, capacity: int = 10_000
) -> GlobalScheduler:
    capacities = {f"i{n}": capacity for n in range(sliders.instances)}
    return GlobalScheduler(
        sliders, SLO(4.0, 0.1), Learned(move_seconds=0.05), policy or Policy(dwell=0.0), capacities
    )


def step(at: float, instance: str, kv: int = 0, prefill: int = 0, missed: tuple[str, ...] = ()) -> Stepped:
    return Stepped(at, instance, seconds=0.02, prefill_tokens=prefill, decodes=1, kv_tokens=kv, missed=missed)


def decoding(s: GlobalScheduler, name: str, prompt: int, at: float = 0.0) -> None:
    """Bring a request to decode on the D-heavy i1 of a hybrid, one token out."""
    assert isinstance(s.on(Arrived(at, name, prompt, 1000))[0], Prefill)
    where = s.requests[name].instance
    sent = s.on(Prefilled(at, name, 0, where, held=where == "i0"))
    if where == "i0":
        assert [(c.on, c.leg, c.move) for c in sent if isinstance(c, Decode)] == [("i1", 1, Move.HAND_OVER)]
        s.on(Flowed(at, name, 1, "i1", 1, prompt, 0.05))
    assert s.requests[name].instance == "i1"


def moves(commands: list[Command]) -> list[tuple[str, str, Move]]:
    return [(c.request, c.to, c.move) for c in commands if isinstance(c, Flow)]


def assert_empty(s: GlobalScheduler) -> None:
    assert not s.requests
    for i in s.instances.values():
        assert (i.decodes, i.arriving, i.queued_tokens, i.queued_requests) == (0, 0, 0, 0)
        assert (i.queued_attention, i.context_base) == (0, 0)
        assert (i.progress_tokens, i.reserved_tokens, i.leaving_tokens) == (0, 0, 0)


def test_disaggregation_prefills_on_p_heavy_and_hands_over_with_room_promised() -> None:
    s = scheduler(DISAGGREGATION, Policy(watermark=1.0))
    (sent,) = s.on(Arrived(0.0, "a", 100, 50))
    assert isinstance(sent, Prefill)
    assert (sent.on, sent.hand_over, sent.leg) == ("i0", True, 0)
    (decode,) = s.on(Prefilled(0.1, "a", 0, "i0", held=True))
    assert isinstance(decode, Decode)
    assert (decode.on, decode.leg, decode.move) == ("i1", 1, Move.HAND_OVER)
    assert s.instances["i1"].reserved_tokens == 100 + 1 + 8  # prompt, first token, growth on the way
    s.on(Flowed(0.2, "a", 1, "i1", 2, 101, 0.05))
    assert s.instances["i1"].reserved_tokens == 0
    s.on(Finished(0.3, "a", 50))
    assert_empty(s)


def test_aggregation_never_moves_anything() -> None:
    s = scheduler(Sliders(p_heavy=0, d_heavy=2, p_chunk=0, d_chunk=256))
    (sent,) = s.on(Arrived(0.0, "a", 9_000, 500))
    assert isinstance(sent, Prefill)
    assert not sent.hand_over
    assert s.on(Prefilled(0.1, "a", 0, "i0")) == []
    assert s.on(step(0.2, "i0", kv=9_900)) == []


def test_output_is_counted_by_the_steps_of_the_instance_but_for_missed_ones() -> None:
    s = scheduler()
    decoding(s, "a", 100)
    for n in range(5):
        s.on(step(0.02 * n, "i1", kv=100, missed=("a",) if n == 3 else ()))
    assert s.requests["a"].output_tokens(s.instances["i1"].ticks) == 1 + 4


def test_longest_output_is_degraded_when_kv_passes_the_watermark() -> None:
    s = scheduler()
    decoding(s, "young", 500, at=0.2)
    decoding(s, "old", 500, at=0.0)
    s.requests["old"].first_at = 0.0
    for n in range(20):
        s.on(step(0.3 + 0.02 * n, "i1", kv=8_000))
    decoding(s, "new", 500, at=0.7)
    assert s.on(step(0.78, "i1", kv=9_500)) == []  # at the watermark is not past it
    sent = s.on(step(0.8, "i1", kv=9_501))
    assert moves(sent) == [("old", "i0", Move.DEGRADE)]
    # The KV that is leaving is not counted again: nobody else has to go.
    assert s.on(step(0.82, "i1", kv=9_520)) == []


def test_watermark_one_never_degrades() -> None:
    s = scheduler(policy=Policy(watermark=1.0, dwell=0.0))
    decoding(s, "a", 500)
    for n in range(20):
        assert s.on(step(0.02 * n, "i1", kv=10_000)) == []


def test_degraded_request_flows_back_when_its_tpot_reaches_alpha() -> None:
    s = scheduler()
    decoding(s, "a", 500, at=0.0)
    for n in range(10):
        s.on(step(0.02 * (n + 1), "i1", kv=600))
    assert moves(s.on(step(0.22, "i1", kv=9_900))) == [("a", "i0", Move.DEGRADE)]
    s.on(step(0.24, "i0"))
    s.on(Flowed(0.24, "a", s.requests["a"].leg, "i0", 13, 512, 0.02))
    assert s.requests["a"].degraded
    # Slow steps of 0.3 s there. After k of them TPOT is (0.24 + 0.3 k) / (12 + k); 0.096 is crossed at k = 5.
    s.on(step(0.5, "i1", kv=1_000))
    for k in range(1, 5):
        assert s.on(Stepped(0.24 + 0.3 * k, "i0", 0.3, 1024, 1, 600)) == []
    sent = s.on(Stepped(1.74, "i0", 0.3, 1024, 1, 600))
    assert moves(sent) == [("a", "i1", Move.BACKFLOW)]


def test_refused_move_leaves_the_request_where_it_was_and_frees_the_promised_room() -> None:
    s = scheduler()
    decoding(s, "a", 500)
    (flow,) = s.on(Asked(0.1, "a", "i0"))
    assert isinstance(flow, Flow)
    assert s.instances["i0"].reserved_tokens > 0
    s.on(step(0.12, "i1"))
    s.on(Refused(0.13, "a", flow.leg, "no room", output_tokens=2))
    assert s.instances["i0"].reserved_tokens == 0
    assert (s.requests["a"].state, s.requests["a"].instance) == (State.DECODING, "i1")
    assert s.requests["a"].output_tokens(s.instances["i1"].ticks) == 2
    s.on(Flowed(0.14, "a", flow.leg, "i0", 3, 0, 0.01))  # late: that leg was refused
    assert s.requests["a"].instance == "i1"
    s.on(Finished(0.2, "a", 9))
    assert_empty(s)


def test_late_facts_change_nothing() -> None:
    s = scheduler()
    decoding(s, "a", 500)
    leg = s.requests["a"].leg
    assert s.on(Prefilled(0.1, "a", leg + 7, "i1")) == []
    assert s.on(Flowed(0.1, "a", leg, "i1", 5, 0, 0.0)) == []
    assert s.on(Refused(0.1, "a", leg, "late")) == []
    s.on(Finished(0.2, "a", 5))
    assert s.on(Finished(0.3, "a", 5)) == []
    assert s.on(Cancelled(0.3, "a")) == []
    assert s.on(Asked(0.3, "a", "i0")) == []
    assert_empty(s)


def test_cancelled_request_is_aborted_and_leaves_nothing_behind_in_any_state() -> None:
    s = scheduler()
    s.on(Arrived(0.0, "a", 500, 10))
    decoding(s, "b", 500)
    decoding(s, "c", 500)
    s.on(Asked(0.1, "c", "i0"))
    for name in "abc":
        assert s.on(Cancelled(0.2, name)) == [Abort(name, Outcome.CANCELLED, "the client left")]
    assert_empty(s)


def test_no_room_on_any_d_heavy_instance_leaves_the_decode_where_it_prefilled() -> None:
    s = scheduler(DISAGGREGATION)
    s.on(step(0.0, "i1", kv=9_990))
    s.on(Arrived(0.0, "a", 100, 50))
    (decode,) = s.on(Prefilled(0.1, "a", 0, "i0", held=True))
    assert isinstance(decode, Decode)
    assert (decode.on, decode.why) == ("i0", "no D-heavy instance has room")
    assert s.requests["a"].degraded


def test_lost_instance_sends_its_prompts_and_decodes_elsewhere() -> None:
    s = scheduler(Sliders(p_heavy=1, d_heavy=2, p_chunk=1024, d_chunk=256))
    for name in ("queued", "running", "leaving", "coming"):
        s.on(Arrived(0.0, name, 500, 100))
    homes = {name: s.requests[name].instance for name in s.requests}
    assert homes == {"queued": "i1", "running": "i2", "leaving": "i1", "coming": "i2"}
    s.on(Prefilled(0.1, "running", 0, "i2"))
    s.on(Prefilled(0.1, "leaving", 0, "i1"))
    s.on(Prefilled(0.1, "coming", 0, "i2"))
    s.on(Asked(0.2, "leaving", "i2"))
    s.on(Asked(0.2, "coming", "i1"))
    sent = s.on(Lost(0.3, "i1", "killed"))
    assert [type(c).__name__ for c in sent] == ["Prefill", "Decode"]
    prefill, decode = sent
    assert isinstance(prefill, Prefill)
    assert isinstance(decode, Decode)
    assert (prefill.request, prefill.leg, prefill.on) == ("queued", 1, "i2")
    assert (decode.request, decode.leg, decode.on, decode.move) == ("coming", 2, "i2", Move.RESCUE)
    assert s.requests["leaving"].instance is None
    assert s.on(Stepped(0.31, "i1", 0.02, 0, 1, 500)) == []  # late: that instance is lost
    for name in list(s.requests):
        s.on(Finished(1.0, name, 100))
    assert_empty(s)


def test_drained_instance_sends_its_movable_decodes_away_and_gets_nothing_new() -> None:
    s = scheduler()
    decoding(s, "a", 500)
    s.on(Arrived(0.0, "fixed", 100, 100, movable=False))
    s.on(Prefilled(0.1, "fixed", 0, "i1"))
    assert moves(s.on(Drained(0.2, "i1"))) == [("a", "i0", Move.DRAIN)]
    (sent,) = s.on(Arrived(0.3, "b", 100, 100))
    assert isinstance(sent, Prefill)
    assert (sent.on, sent.hand_over) == ("i0", False)  # nobody D-heavy to hand over to
    s.on(Drained(0.4, "i1", on=False))
    (sent,) = s.on(Arrived(0.5, "c", 100, 100))
    assert isinstance(sent, Prefill)
    assert sent.on == "i1"


def test_everybody_draining_still_serves() -> None:
    s = scheduler()
    s.on(Drained(0.0, "i0"))
    s.on(Drained(0.0, "i1"))
    assert isinstance(s.on(Arrived(0.1, "a", 100, 100))[0], Prefill)


def test_sliders_move_live_and_chunk_zero_waits_for_the_queued_prompts() -> None:
    s = scheduler()
    s.on(Arrived(0.0, "a", 100, 100))
    assert s.requests["a"].instance == "i1"
    sent = s.on(Slid(0.1, Sliders(p_heavy=1, d_heavy=1, p_chunk=2048, d_chunk=0)))
    assert sent == [SetChunk("i0", Kind.P_HEAVY, 2048)]
    (prefill,) = s.on(Arrived(0.2, "b", 100, 100))
    assert isinstance(prefill, Prefill)
    assert prefill.on == "i0"
    assert s.on(Prefilled(0.3, "a", 0, "i1")) == [SetChunk("i1", Kind.D_HEAVY, 0)]


def test_every_kind_of_event_has_its_decider() -> None:
    assert set(scheduler()._deciders) == set(get_args(Event))


def test_capacity_of_every_instance_must_be_given() -> None:
    with pytest.raises(ValueError, match="i1"):
        GlobalScheduler(HYBRID, SLO(1, 1), Learned(), Policy(), {"i0": 100})


def test_last_one_who_prefills_is_lost_and_a_d_heavy_instance_takes_its_place() -> None:
    s = scheduler(DISAGGREGATION)
    s.on(Arrived(0.0, "a", 100, 50))
    chunk, prefill = s.on(Lost(0.1, "i0", "killed"))
    assert chunk == SetChunk("i1", Kind.P_HEAVY, 2048)
    assert isinstance(prefill, Prefill)
    assert (prefill.on, prefill.leg, prefill.hand_over) == ("i1", 1, False)


def test_predicted_and_actual_ttft_are_compared_without_the_move() -> None:
    s = scheduler(DISAGGREGATION, Policy(watermark=1.0))
    (sent,) = s.on(Arrived(0.0, "a", 100, 50))
    assert isinstance(sent, Prefill)
    assert sent.forecasts[0].ttft == pytest.approx(0.1)  # 100 x 0.5 ms and 50 ms for the move
    s.on(Prefilled(0.08, "a", 0, "i0", held=True))
    drift = s.accuracy["i0"].ttft
    assert (drift.count, drift.predicted, drift.actual) == (1, pytest.approx(0.05), 0.08)


def test_predicted_and_actual_tpot_are_compared_where_a_request_ends() -> None:
    s = scheduler()
    decoding(s, "a", 100)
    for n in range(10):
        s.on(step(0.03 * (n + 1), "i1", kv=100))
    s.on(Finished(0.3, "a", 11))
    drift = s.accuracy["i1"].tpot
    assert (drift.count, drift.predicted) == (1, pytest.approx(0.02))
    assert drift.actual == pytest.approx(0.03)


def test_backflow_rate_of_one_in_ten_says_too_few_d_heavy() -> None:
    counters = Counters()
    for n in range(100):
        counters.ended(Outcome.FINISHED, backflows=1 if n % 20 == 0 else 0)
    assert counters.reading == "ok"
    for n in range(300):
        counters.ended(Outcome.FINISHED, backflows=1 if n % 8 == 0 else 0)
    assert counters.reading.startswith("too few D-heavy instances")
    assert counters.outcomes[Outcome.FINISHED] == 400


def test_moves_are_counted_when_they_land_and_when_they_are_refused() -> None:
    s = scheduler()
    decoding(s, "a", 500)
    for answer in ("refused", "landed"):
        (flow,) = s.on(Asked(0.1, "a", "i0"))
        assert isinstance(flow, Flow)
        if answer == "refused":
            s.on(Refused(0.2, "a", flow.leg, "no room"))
        else:
            s.on(Flowed(0.2, "a", flow.leg, "i0", 3, 500, 0.02))
    assert (s.counters.moves[Move.OPERATOR], s.counters.refused[Move.OPERATOR]) == (1, 1)


# A prompt of 3000 tokens in chunks of 1024 on the P-heavy i0; its decode will run on i1 or i2.
AHEAD = Policy(ahead=True)
TWO_DECODERS = Sliders(p_heavy=1, d_heavy=2, p_chunk=1024, d_chunk=0)


def test_a_prompt_of_several_chunks_is_told_where_its_kv_may_go_after_the_first_one() -> None:
    s = scheduler(TWO_DECODERS, AHEAD)
    s.on(Arrived(0.0, "a", 3000, 50))
    assert s.on(step(0.1, "i0", kv=1024, prefill=1024)) == [
        Ahead("a", 1, "i1", "the D-heavy instance with most room")
    ]
    assert s.on(step(0.2, "i0", kv=2048, prefill=1024)) == []
    (decode,) = s.on(Prefilled(0.3, "a", 0, "i0", held=True))
    assert isinstance(decode, Decode)
    assert (decode.on, decode.leg) == ("i1", 1)


def test_a_decode_goes_where_its_kv_is_even_if_another_has_more_room_by_now() -> None:
    s = scheduler(TWO_DECODERS, AHEAD)
    s.on(Arrived(0.0, "a", 3000, 50))
    s.on(step(0.1, "i0", kv=1024, prefill=1024))
    s.on(step(0.2, "i1", kv=3100))  # the blocks that were given to it
    (decode,) = s.on(Prefilled(0.3, "a", 0, "i0", held=True))
    assert isinstance(decode, Decode)
    assert (decode.on, decode.why) == ("i1", "a D-heavy instance with room, and most of its KV is there")


def test_where_its_kv_was_copied_to_is_full_by_now_it_goes_elsewhere() -> None:
    s = scheduler(TWO_DECODERS, AHEAD)
    s.on(Arrived(0.0, "a", 3000, 50))
    s.on(step(0.1, "i0", kv=1024, prefill=1024))
    s.on(step(0.2, "i1", kv=9_600))
    (decode,) = s.on(Prefilled(0.3, "a", 0, "i0", held=True))
    assert isinstance(decode, Decode)
    assert decode.on == "i2"


def test_a_prompt_of_one_chunk_has_nothing_to_send_ahead() -> None:
    s = scheduler(TWO_DECODERS, AHEAD)
    s.on(Arrived(0.0, "a", 1000, 50))
    assert s.on(step(0.1, "i0", kv=1000, prefill=1000)) == []
