"""What follows when the sliders set themselves, and when the SLO changes under those who run."""

from __future__ import annotations

from taichi_serve.eventlog import decode, encode
from taichi_serve.latency.predict import Average, Learned
from taichi_serve.messages import (
    Arrived,
    Asked,
    Command,
    Flow,
    Flowed,
    Move,
    Prefill,
    Prefilled,
    Promised,
    SetChunk,
    Stepped,
    Tuned,
)
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

START = Sliders(1, 1, 1024, 256)
SMALLER = Sliders(1, 1, 1024, 192)
TUNED = Tuned(1.0, SMALLER, 0.3, 0.65, "S_D 256 -> 192: TPOT is short", 0.05)


def scheduler() -> GlobalScheduler:
    """i1 computes a prompt in 1 s, i0 at once."""
    predictor = Learned(fixed={"i1": Average(1.0, 1.0)})
    return GlobalScheduler(START, SLO(4.0, 0.05), predictor, Policy(), {"i0": 10_000, "i1": 10_000})


def placed(s: GlobalScheduler, name: str) -> str:
    (sent,) = (c for c in s.on(Arrived(2.0, name, 100, 50)) if isinstance(c, Prefill))
    return sent.on


def test_sliders_that_set_themselves_set_the_chunks_of_the_instances() -> None:
    s = scheduler()
    assert s.on(TUNED) == [SetChunk("i1", Kind.D_HEAVY, 192)]
    assert s.sliders == SMALLER


def test_a_margin_that_was_set_counts_for_the_next_prompt() -> None:
    s = scheduler()
    assert placed(s, "a") == "i1"  # 1 s is within 0.5 x 4 s
    s.on(Tuned(1.0, START, 0.2, 0.8, "TTFT margin 0.5 -> 0.2"))
    assert placed(s, "b") == "i0"  # but not within 0.2 x 4 s
    assert (s.policy.ttft_margin, s.policy.tpot_margin) == (0.2, 0.8)


def test_a_suggestion_changes_nothing() -> None:
    s = scheduler()
    assert s.on(Tuned(1.0, SMALLER, 0.3, 0.65, "why", act=False)) == []
    assert s.sliders == START
    assert s.policy == Policy()


def test_sliders_of_another_number_of_instances_are_ignored() -> None:
    s = scheduler()
    assert s.on(Tuned(1.0, Sliders(2, 2, 1024, 192), 0.5, 0.8, "why")) == []
    assert s.sliders == START


def test_another_ttft_slo_counts_for_the_next_prompt() -> None:
    s = scheduler()
    s.on(Promised(1.0, SLO(1.0, 0.05)))
    assert placed(s, "a") == "i0"


def test_another_tpot_slo_decides_who_flows_back_among_those_who_run() -> None:
    """Two requests on i0 with running TPOTs of 27 and 19 ms: the first is too long from now on."""
    s = scheduler()
    for name, first in (("a", 0.0), ("b", 0.1)):
        s.on(Arrived(first, name, 100, 1000))
        s.on(Prefilled(first, name, 0, "i1"))
        s.on(Asked(first, name, "i0"))
        s.on(Flowed(first, name, 1, "i0", 2, 100, 0.0))
    s.instances["i1"].kv_tokens = 0
    went: list[Command] = []
    for n in range(1, 11):  # ten steps of i0 until 0.3 s, two tokens before
        went += s.on(Stepped(0.03 * n, "i0", 0.03, 0, 2, 200))
    assert went == []
    s.on(Promised(0.3, SLO(4.0, 0.025)))
    back = [(c.request, c.move) for c in s.on(Stepped(0.33, "i0", 0.03, 0, 2, 200)) if isinstance(c, Flow)]
    assert back == [("a", Move.BACKFLOW)]
    assert s.ledger.residents["i0"].everyone(0.3, 0) == ["b"]


def test_both_facts_come_back_from_the_log_as_they_were() -> None:
    for fact in (TUNED, Promised(1.0, SLO(6.0, 0.05))):
        assert decode(encode(fact, [])) == (fact, ())
