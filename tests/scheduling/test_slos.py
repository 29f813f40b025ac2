"""Requests with SLOs of their own: each is placed, degraded, brought back and counted by the one it has."""

from __future__ import annotations

from taichi_serve.classes import SLOClass
from taichi_serve.eventlog import decode, encode, replay
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import (
    Arrived,
    Asked,
    Cancelled,
    Event,
    Finished,
    Flow,
    Flowed,
    Hopeless,
    Lost,
    Move,
    Outcome,
    Prefill,
    Prefilled,
    Promised,
    Stepped,
)
from taichi_serve.request import Request, State
from taichi_serve.scheduling.counters import Attained, Kept
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.residents import Residents
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.scheduling.strictest import Strictest
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

SERVERS = SLO(ttft=4.0, tpot=0.1)
LOOSE = SLO(ttft=40.0, tpot=0.5)
TIGHT = SLO(ttft=0.1, tpot=0.02)
HYBRID = Sliders(p_heavy=1, d_heavy=1, p_chunk=1024, d_chunk=256)


def scheduler() -> GlobalScheduler:
    policy = Policy(dwell=0.0)
    return GlobalScheduler(HYBRID, SERVERS, Learned(move_seconds=0.05), policy, {"i0": 10_000, "i1": 10_000})


def decoding(name: str, slo: SLO, first_at: float, output: int) -> Request:
    return Request(name, 0.0, 100, 1000, slo, state=State.DECODING, first_at=first_at, base=output)


def residents(*requests: Request) -> Residents:
    here = Residents(alpha=1.0, max_degrades=2)
    for request in requests:
        here.add(request)
    return here


# ------------------------------------------------------------------------------------------- Algorithm 1


def test_who_crosses_first_is_asked_across_slos() -> None:
    # At 2 s, 20 steps on. tight: 30 tokens may take 0.58 s, it began at 1 s: 0.42 s over. loose: 21 tokens
    # may take 10 s. usual: 20 tokens may take 1.9 s, it began at 0 s: 0.1 s over.
    here = residents(
        decoding("usual", SERVERS, 0.0, 0),
        decoding("loose", LOOSE, 0.0, 1),
        decoding("tight", TIGHT, 1.0, 10),
    )
    assert list(here.crossing(2.0, 20)) == ["tight", "usual"]
    assert here.everyone(2.0, 20) == ["tight", "usual", "loose"]


def test_slack_is_that_of_the_own_tpot_slo() -> None:
    here, loose = residents(), decoding("loose", LOOSE, 0.0, 11)
    assert here.slack(loose, 2.0, 0) == 10 * 0.5 - 2.0


def test_the_loosest_is_degraded_first_and_of_equals_the_longest() -> None:
    here = residents(
        decoding("long", SERVERS, 0.0, 90),
        decoding("short", LOOSE, 0.0, 5),
        decoding("longer", LOOSE, 0.0, 50),
    )
    assert list(here.longest()) == ["longer", "short", "long"]


def test_residents_leave_by_the_keys_that_they_came_with() -> None:
    loose, usual = decoding("loose", LOOSE, 0.0, 5), decoding("usual", SERVERS, 0.0, 5)
    here = residents(loose, usual)
    here.remove(loose)
    assert (len(here), here.everyone(1.0, 0)) == (1, ["usual"])
    here.remove(usual)
    assert (len(here), list(here.longest())) == (0, [])


def test_backflow_comes_at_the_own_tpot_slo_and_says_so() -> None:
    """Two requests on i0 at 30 ms a token: only the one that is promised 20 ms goes back."""
    s = scheduler()
    for name, slo in (("usual", None), ("tight", TIGHT)):
        s.on(Arrived(0.0, name, 100, 1000, slo=slo))
        if s.requests[name].instance == "i0":  # i1 is not calm enough for it before its first step
            s.on(Prefilled(0.0, name, 0, "i0", held=True))
            s.on(Flowed(0.0, name, 1, "i1", 1, 100, 0.0))
            s.on(Asked(0.0, name, "i0"))
            s.on(Flowed(0.0, name, 2, "i0", 2, 100, 0.0))
            continue
        s.on(Prefilled(0.0, name, 0, "i1"))
        s.on(Asked(0.0, name, "i0"))
        s.on(Flowed(0.0, name, 1, "i0", 2, 100, 0.0))
    went = [c for n in range(1, 21) for c in s.on(Stepped(0.03 * n, "i0", 0.03, 0, 2, 200))]
    assert [(c.request, c.move, c.why) for c in went if isinstance(c, Flow)] == [
        ("tight", Move.BACKFLOW, "running TPOT reached 0.96 of 0.02 s")
    ]


# -------------------------------------------------------------------------------------------- the strictest


def test_the_strictest_is_that_of_those_under_way() -> None:
    live = Strictest()
    assert (live.slo, live.beside(LOOSE)) == (None, LOOSE)
    for slo in (LOOSE, TIGHT, TIGHT, SLO(20.0, 0.01)):
        live.add(slo)
    assert live.slo == SLO(0.1, 0.01)
    live.drop(TIGHT)
    live.drop(SLO(20.0, 0.01))
    assert live.slo == TIGHT
    live.drop(TIGHT)
    assert (live.slo, live.beside(SERVERS)) == (LOOSE, SERVERS)
    assert live.beside(SLO(50.0, 0.1)) == SLO(40.0, 0.1)


def test_requests_that_are_over_bind_nobody() -> None:
    s = scheduler()
    s.on(Arrived(0.0, "usual", 100, 50))
    assert s.ledger.strictest.beside(LOOSE) == SERVERS
    s.on(Cancelled(1.0, "usual"))
    assert s.ledger.strictest.slo is None


def test_what_one_client_asks_for_beyond_all_promises_rules_itself_only() -> None:
    s = scheduler()
    s.on(Arrived(0.0, "greedy", 100, 50, slo=SLO(0.001, 0.0001)))
    beside = s.ledger.strictest.beside
    assert (beside(SERVERS), beside(LOOSE)) == (SERVERS, SERVERS)
    assert beside(SLO(0.001, 0.0001)) == SLO(0.001, 0.0001)
    assert beside(SLO(0.5, 0.1)) == SLO(0.5, 0.1)
    s.on(Arrived(0.0, "another", 100, 50, slo=SLO(0.0005, 0.2)))
    assert s.ledger.strictest.slo == SERVERS


def test_what_one_client_asks_for_changes_no_place_of_the_others() -> None:
    # Were the others loose beside it, they would prefer the P-heavy i0.
    alone, beside = scheduler(), scheduler()
    places = []
    for s in (alone, beside):
        for name in ("i0", "i1"):
            s.on(Stepped(0.0, name, 0.02, 0, 1, 0))
        if s is beside:
            s.on(Arrived(0.0, "greedy", 1, 50, slo=SLO(0.001, 0.0001)))
        places += [c.on for c in s.on(Arrived(0.0, "usual", 100, 50)) if isinstance(c, Prefill)]
    assert places == ["i1", "i1"]


def test_the_strictest_is_within_what_the_server_and_its_classes_promise() -> None:
    live = Strictest()
    live.bound(SERVERS, (SLOClass("chat", ttft_slo=1.0), SLOClass("code", tpot_slo=0.05)))
    live.add(LOOSE)
    assert live.slo == LOOSE
    live.add(TIGHT)
    assert live.slo == SLO(1.0, 0.05)
    live.promise(SLO(0.5, 0.01), ())
    assert live.slo == SLO(0.5, 0.02)
    live.drop(TIGHT)
    assert live.slo == LOOSE


# ------------------------------------------------------------------------------- the server's, or its own


def test_an_operator_changes_the_slo_of_those_that_have_none_of_their_own() -> None:
    s = scheduler()
    s.on(Arrived(0.0, "usual", 100, 1000))
    s.on(Arrived(0.0, "loose", 100, 1000, slo=LOOSE))
    assert (s.requests["usual"].slo, s.requests["loose"].slo) == (SERVERS, LOOSE)
    s.on(Promised(1.0, TIGHT))
    assert (s.requests["usual"].slo, s.requests["loose"].slo) == (TIGHT, LOOSE)
    s.on(Arrived(1.0, "next", 100, 1000))
    assert s.requests["next"].slo == TIGHT


def test_a_log_has_an_slo_only_where_it_is_not_the_servers() -> None:
    assert "slo" not in encode(Arrived(0.0, "a", 100, 10), ())
    own = Arrived(0.0, "a", 100, 10, slo=LOOSE, slo_class="batch")
    assert decode(encode(own, ())) == (own, ())


def test_a_replay_of_requests_with_their_own_slos_decides_the_same() -> None:
    facts: list[Event] = []
    for n in range(30):
        slo = (None, LOOSE, TIGHT)[n % 3]
        facts.append(Arrived(0.01 * n, f"r{n}", 100 + 150 * n, 500, slo=slo))
        facts.append(Stepped(0.01 * n + 0.005, f"i{n % 2}", 0.02, 64, 0, 64 * n))
    first = scheduler()
    entries = [decode(encode(fact, first.on(fact))) for fact in facts]
    assert list(replay(scheduler(), entries)) == []
    plain = [(Arrived(e.at, e.request, e.prompt_tokens, e.max_tokens) if isinstance(e, Arrived) else e, c)
             for e, c in entries]  # fmt: skip
    assert list(replay(scheduler(), plain)) != []


# ------------------------------------------------------------------------------------------------ counted


def attained(s: GlobalScheduler, name: str) -> tuple[tuple[int, int], ...]:
    of = s.counters.attained.get(name, Attained())
    return tuple((kept.met, kept.missed) for kept in (of.ttft, of.tpot, of.both))


def served(s: GlobalScheduler, arrived: Arrived, first: float, end: float, tokens: int) -> None:
    (sent, *_) = [c for c in s.on(arrived) if isinstance(c, Prefill)]
    s.on(Prefilled(first, arrived.request, 0, sent.on, held=sent.hand_over))
    s.on(Finished(end, arrived.request, tokens))


def test_requests_are_counted_by_class_and_by_their_own_slo() -> None:
    s = scheduler()
    # 2 s to the first token, then 10 tokens in 2 s: good by 40 s and 500 ms, too slow by 4 s and 100 ms.
    served(s, Arrived(0.0, "a", 100, 50, slo=LOOSE, slo_class="batch"), 2.0, 4.0, 11)
    served(s, Arrived(0.0, "b", 100, 50), 2.0, 4.0, 11)
    served(s, Arrived(0.0, "c", 100, 50), 5.0, 5.5, 11)
    assert attained(s, "batch") == ((1, 0), (1, 0), (1, 0))
    assert attained(s, "default") == ((1, 1), (1, 1), (0, 2))


def test_a_request_that_failed_missed_its_slos_and_one_whose_client_left_only_when_it_was_late() -> None:
    s = scheduler()
    s.on(Arrived(0.0, "failed", 100, 50))
    s.on(Finished(1.0, "failed", 0, Outcome.FAILED))
    assert attained(s, "default") == ((0, 1), (0, 1), (0, 1))
    s.on(Arrived(2.0, "left", 100, 50))
    s.on(Cancelled(3.0, "left"))
    assert attained(s, "default") == ((0, 1), (0, 1), (0, 1))
    s.on(Arrived(4.0, "gave up", 100, 50))
    s.on(Cancelled(8.5, "gave up"))
    assert attained(s, "default") == ((0, 2), (0, 1), (0, 2))


def test_requests_that_are_given_up_count_once() -> None:
    s = scheduler()
    s.on(Arrived(0.0, "a", 100, 50, slo_class="batch"))
    for name in ("i0", "i1"):
        s.on(Lost(1.0, name, "killed"))
    s.on(Hopeless(2.0, "it died five times"))
    assert attained(s, "batch") == ((0, 1), (0, 1), (0, 1))
    assert s.counters.outcomes[Outcome.FAILED] == 1


def test_kept_counts_both_ways() -> None:
    kept = Kept()
    kept.add(True)
    kept.add(False)
    assert (kept.met, kept.missed) == (1, 1)
