"""The recorder: the scheduler's decisions pass through unchanged, and what happened can be asked for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from taichi_serve.frontend import record
from taichi_serve.frontend.record import Recorder, legs, view
from taichi_serve.latency.predict import Average, Learned
from taichi_serve.messages import (
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
    Move,
    Outcome,
    Prefill,
    Prefilled,
    Refused,
    Stepped,
    Tuned,
)
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

CAPACITY = 100_000
BYTES = 2048


def recorder() -> Recorder:
    """Over i0 P-heavy and i1 D-heavy."""
    capacities = {"i0": CAPACITY, "i1": CAPACITY}
    # With a TTFT SLO that nothing meets, the fastest instance prefills: i1 is known to be slow.
    slow = Learned(fixed={"i1": Average(100.0, 1.0)})
    scheduler = GlobalScheduler(Sliders(1, 1, 1024, 256), SLO(1e-6, 0.07), slow, Policy(), capacities)
    return Recorder(scheduler, BYTES)


def one_life(recorder: Recorder, name: str) -> list[Command]:
    """Prefilled on i0, handed over to i1, moved back by an operator; 5 tokens in all."""
    facts: list[Event] = [
        Arrived(0.0, name, 100, 5),
        Stepped(1.0, "i0", 0.5, 100, 0, 112),
        Prefilled(1.0, name, 0, "i0", 0, held=True),
        Flowed(1.1, name, 1, "i1", 2, kv_tokens=100, gap=0.1, reused=100),
        Asked(1.2, name, "i0"),
        Flowed(1.5, name, 2, "i0", 4, kv_tokens=0, gap=0.3, reused=0),
        Finished(1.6, name, 5),
    ]
    return [command for fact in facts for command in recorder.on(fact)]


def test_one_life_is_counted_and_can_be_read_leg_by_leg() -> None:
    here = recorder()
    assert [type(c) for c in one_life(here, "cmpl-a-0-7f")] == [Prefill, Decode, Flow]
    assert (here.accepted, here.outcomes[Outcome.FINISHED]) == (1, 1)
    assert (here.moves[Move.HAND_OVER], here.moves[Move.OPERATOR]) == (1, 1)
    assert (here.moved_bytes, here.recomputes) == (100 * BYTES, 1)
    assert list(here.gaps) == [0.1, 0.3]
    assert (here.steps["i0"], here.prefill_tokens["i0"]) == (1, 100)

    view = here.view("cmpl-a-0-7f")
    assert [(leg["leg"], leg["instance"], leg["kind"], leg["output_tokens"]) for leg in view["legs"]] == [
        (0, "i0", "prefill", 1),
        (1, "i1", "decode", 2),
        (2, "i0", "decode", 4),
    ]
    assert [row["type"] for row in view["log"]] == [
        *("Arrived", "Prefill", "Prefilled", "Decode", "Flowed", "Flow", "Flowed", "Finished")
    ]


def test_a_request_is_found_by_the_id_that_its_user_knows() -> None:
    here = recorder()
    for name in ("cmpl-a-0-7f", "0_cmpl-b-0-7f", "1_cmpl-b-0-7f", "cmpl-ab-0-7f"):
        here.on(Arrived(0.0, name, 10, 5))
    assert here.find("cmpl-a") == ["cmpl-a-0-7f"]
    assert here.find("cmpl-b") == ["0_cmpl-b-0-7f", "1_cmpl-b-0-7f"]  # n = 2: two choices
    assert here.find("cmpl-a-0-7f") == ["cmpl-a-0-7f"]
    assert here.find("cmpl-c") == []


def test_a_move_that_did_not_happen_is_remembered_too() -> None:
    here = recorder()
    here.on(Arrived(0.0, "a", 10, 5))
    here.on(Refused(1.0, "a", 1, "no room"))
    assert [row["type"] for row in here.view("a")["log"]][-1] == "Refused"


def test_sliders_that_set_themselves_while_a_request_lived_are_in_its_record() -> None:
    here = recorder()
    changes = [Tuned(at, Sliders(1, 1, 1024, 192), 0.5, 0.8, f"at {at:g}") for at in (0.5, 1.05, 3.0)]
    here.on(changes[0])
    one_life(here, "a")
    here.on(changes[1])
    here.on(changes[2])  # after it was over
    assert list(here.tuned) == changes
    late = recorder()
    late.on(Arrived(1.0, "b", 10, 5))
    late.on(changes[1])
    assert [row["type"] for row in late.view("b")["log"]] == ["Arrived", "Prefill", "Tuned"]
    rows = here.view("a")["log"]
    assert [row["why"] for row in rows if row["type"] == "Tuned"] == ["at 0.5", "at 1.05"]
    assert [row["type"] for row in rows][:3] == ["Arrived", "Prefill", "Tuned"]


def test_a_history_without_its_beginning_counts_time_from_its_first_fact() -> None:
    begun = [Flow("a", 2, "i0", Move.DEGRADE), Flowed(7.5, "a", 2, "i0", 9, 300, 0.1)]
    assert view("a", begun)["arrived_at"] == 7.5
    assert view("a", begun[:1])["arrived_at"] == 0.0


def test_bound_requests_are_counted_by_their_reason() -> None:
    here = recorder()
    here.on(Arrived(0.0, "a", 10, 5, movable=False, bound_by="seed"))
    here.on(Arrived(0.0, "b", 10, 5, movable=False, bound_by="seed"))
    here.on(Arrived(0.0, "c", 10, 5))
    assert dict(here.bound) == {"seed": 2}


def test_accepted_is_finished_plus_cancelled_plus_failed() -> None:
    here = recorder()
    for name in "abc":
        here.on(Arrived(0.0, name, 10, 5))
    here.on(Cancelled(0.5, "a"))
    for name, outcome in zip("abc", (Outcome.CANCELLED, Outcome.FAILED, Outcome.FINISHED), strict=True):
        here.on(Finished(1.0, name, 0, outcome))
    assert here.accepted == sum(here.outcomes.values()) == 3


def test_only_the_last_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "KEEP", 2)
    here = recorder()
    for name in ("a", "b", "c"):
        one_life(here, name)
    assert list(here.histories) == ["b", "c"]


def test_every_fact_with_its_decisions_can_be_written_down() -> None:
    written: list[tuple[Event, Sequence[Command]]] = []
    here = recorder()
    here._write = lambda event, commands: written.append((event, commands))
    commands = one_life(here, "a")
    assert len(written) == 7
    assert [command for _, row in written for command in row] == commands


def test_a_request_that_never_began_has_no_legs() -> None:
    assert legs([Arrived(0.0, "a", 10, 5), Finished(1.0, "a", 0, Outcome.CANCELLED)]) == []


def test_hashes_of_a_prompt_go_to_the_log_and_not_into_the_memory() -> None:
    written: list[Event] = []
    here = recorder()
    here._write = lambda event, commands: written.append(event)
    arrived = Arrived(0.0, "a", 100, 5, blocks=(5, 6))
    here.on(arrived)
    assert here.histories["a"][0] == Arrived(0.0, "a", 100, 5)
    assert written == [arrived]


def test_who_looks_is_told_facts_with_their_decisions_and_nobody_afterwards() -> None:
    here, seen = recorder(), []
    here.observers.append(lambda event, commands: seen.append((type(event), [type(c) for c in commands])))
    here.on(Arrived(0.0, "a", 100, 5))
    here.on(Stepped(1.0, "i0", 0.5, 100, 0, 112))  # decides nothing, and comes by the thousand
    here.on(Prefilled(1.0, "a", 0, "i0", 0, held=True))
    assert seen == [(Arrived, [Prefill]), (Prefilled, [Decode])]
    here.observers.clear()
    here.on(Cancelled(2.0, "a"))
    assert len(seen) == 2


def test_what_happened_to_instances_is_remembered_and_requests_are_not() -> None:
    here = recorder()
    one_life(here, "a")
    here.on(Drained(2.0, "i0"))
    here.on(Drained(3.0, "i0", on=False))
    assert [event.at for event in here.happened] == [2.0, 3.0]
    for number in range(500):
        here.on(Drained(4.0 + number, "i0"))
    assert len(here.happened) == record.KEEP_HAPPENED
