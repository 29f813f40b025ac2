"""The simulated cluster: small runs whose whole log is known by hand, and what must hold in any run."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from taichi_serve.cluster.base import drive, run
from taichi_serve.cluster.simulated import Call, EngineShape, Link, SimulatedCluster
from taichi_serve.eventlog import encode
from taichi_serve.latency.curve import StepCurve
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import (
    Abort,
    Arrived,
    Command,
    Decode,
    Event,
    Finished,
    Flow,
    Flowed,
    Joined,
    Lost,
    Move,
    Outcome,
    Prefill,
    Prefilled,
    Refused,
    Silent,
    Stepped,
)
from taichi_serve.scheduling.policy import DEMOTE, Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

SECOND = StepCurve(((0, 1.0), (1000, 1.0)), 0.0, 0.0, 0.0)  # every step takes one second
ONE = Sliders(0, 1, 0, 100)
TWO_AND_TWO = Sliders(2, 2, 512, 64)
LINEAR = StepCurve(((0, 0.01), (1000, 0.11)), 1e-8, 1e-7, 1e-5)


@dataclass
class Script:
    """A scheduler that answers every fact of a kind with the commands written down for it, once."""

    answers: dict[tuple[str, str], list[Command]]
    log: list[Event] = field(default_factory=list)

    def on(self, event: Event) -> Sequence[Command]:
        self.log.append(event)
        key = type(event).__name__, getattr(event, "request", getattr(event, "instance", ""))
        return self.answers.pop(key, [])


def cluster(calls, sliders=ONE, kv=1600, latency=0.5, happenings=(), truth=SECOND, running=256):
    link = Link(bytes_per_token=1.0, bandwidth=1000.0, latency=latency)
    return SimulatedCluster(sliders, [truth], EngineShape(kv, running), link, calls, happenings, kv)


def played(answers, made):
    script = Script(answers)
    run(script, made)
    return script.log


def test_a_prompt_of_two_chunks_and_two_tokens_more():
    log = played({("Arrived", "r0"): [Prefill("r0", 0, "i0")]}, cluster([Call(1.0, 150, 3)]))
    assert log == [
        Arrived(1.0, "r0", 150, 1450),
        Stepped(2.0, "i0", 1.0, 100, 0, 160),
        Stepped(3.0, "i0", 1.0, 50, 0, 160),
        Prefilled(3.0, "r0", 0, "i0"),
        Stepped(4.0, "i0", 1.0, 0, 1, 160),
        Stepped(5.0, "i0", 1.0, 0, 1, 0),  # the blocks of who ended are free
        Finished(5.0, "r0", 3),
    ]


def test_what_comes_in_the_middle_of_a_step_is_in_the_step_after_the_next():
    answers = {
        ("Arrived", "r0"): [Prefill("r0", 0, "i0")],
        ("Arrived", "r1"): [Prefill("r1", 0, "i0")],
    }
    log = played(answers, cluster([Call(0.0, 10, 9), Call(0.5, 10, 1)]))
    # Steps end at 1, 2, 3. At 0.5 the second step is planned already, so r1 is in the third.
    assert Prefilled(3.0, "r1", 0, "i0") in log


def test_decodes_do_not_count_against_the_chunk():
    answers = {
        ("Arrived", "r0"): [Prefill("r0", 0, "i0")],
        ("Arrived", "r1"): [Prefill("r1", 0, "i0")],
    }
    log = played(answers, cluster([Call(0.0, 100, 9), Call(0.1, 100, 1)]))
    assert Stepped(3.0, "i0", 1.0, 100, 1, 112) in log


def test_a_hand_over_pins_the_blocks_until_they_are_pulled_and_goes_before_prompts():
    answers = {
        ("Arrived", "r0"): [Prefill("r0", 0, "i0", hand_over=True)],
        ("Prefilled", "r0"): [Decode("r0", 1, "i1", Move.HAND_OVER)],
    }
    made = cluster([Call(0.0, 100, 3)], Sliders(1, 1, 100, 100))
    log = played(answers, made)
    assert log == [
        Arrived(0.0, "r0", 100, 1500),
        Stepped(1.0, "i0", 1.0, 100, 0, 112),
        Prefilled(1.0, "r0", 0, "i0", held=True),
        # 100 tokens at 1000 a second and half a second of latency: landed at 1.6, first token a step later.
        Stepped(2.6, "i1", 1.0, 0, 1, 112),
        Flowed(2.6, "r0", 1, "i1", 2, 100, 1.6, 100),
        Stepped(3.6, "i1", 1.0, 0, 1, 0),
        Finished(3.6, "r0", 3),
    ]
    assert all(e.residents.free == 100 for e in made.engines.values())


def test_a_flow_takes_effect_after_the_token_in_flight():
    flow = Flow("r0", 1, "i1", Move.OPERATOR)
    answers = {("Arrived", "r0"): [Prefill("r0", 0, "i0")], ("Prefilled", "r0"): [flow]}
    log = played(answers, cluster([Call(0.0, 100, 5)], Sliders(1, 1, 100, 100)))
    # Prefilled at 1; the token in flight is out at 2; 101 tokens land at 2.601; third token at 3.601.
    assert [type(e).__name__ for e in log] == [
        "Arrived", "Stepped", "Prefilled", "Stepped", "Stepped", "Flowed", "Stepped", "Stepped", "Finished",
    ]  # fmt: skip
    flowed = next(e for e in log if isinstance(e, Flowed))
    assert (flowed.at, flowed.output_tokens, flowed.kv_tokens, flowed.gap) == pytest.approx(
        (3.601, 3, 101, 1.601)
    )


def test_a_finished_request_crosses_its_flow():
    flow = Flow("r0", 1, "i1", Move.OPERATOR)
    answers = {("Arrived", "r0"): [Prefill("r0", 0, "i0")], ("Prefilled", "r0"): [flow]}
    log = played(answers, cluster([Call(0.0, 100, 2)], Sliders(1, 1, 100, 100)))
    assert log[-1] == Finished(2.0, "r0", 2)
    assert not any(isinstance(e, (Flowed, Refused)) for e in log)


def test_without_a_free_block_the_youngest_is_preempted_and_computed_again():
    # Room for 4 blocks: two prompts of 2 blocks each fill it; when the older needs a third, the younger
    # yields.
    answers = {
        ("Arrived", "r0"): [Prefill("r0", 0, "i0")],
        ("Arrived", "r1"): [Prefill("r1", 0, "i0")],
    }
    made = cluster([Call(0.0, 30, 10), Call(0.0, 30, 10)], kv=64)
    log = played(answers, made)
    missed = [e for e in log if isinstance(e, Stepped) and e.missed]
    assert missed
    assert all(e.missed == ("r1",) for e in missed)
    assert [e.request for e in log if isinstance(e, Finished)] == ["r0", "r1"]
    tokens = sum(e.decodes for e in log if isinstance(e, Stepped))
    again = 1  # the step that computes r1 again also makes a token, as a prompt does
    assert tokens + 2 + again == 20
    assert made.engines["i0"].residents.free == 4


def test_who_is_on_a_lost_instance_goes_on_elsewhere_with_the_tokens_that_were_out():
    answers = {
        ("Arrived", "r0"): [Prefill("r0", 0, "i0")],
        ("Lost", "i0"): [Decode("r0", 1, "i1", Move.RESCUE)],
    }
    made = cluster([Call(0.0, 50, 9)], Sliders(1, 1, 100, 100), happenings=[Lost(3.5, "i0", "killed")])
    log = played(answers, made)
    # Tokens at 1, 2 and 3 are out, the one in flight is lost. The rescue computes 53 tokens and makes the
    # fourth.
    flowed = next(e for e in log if isinstance(e, Flowed))
    assert (flowed.at, flowed.output_tokens, flowed.kv_tokens) == (4.5, 4, 0)
    assert log[-1] == Finished(9.5, "r0", 9)


def test_an_aborted_request_frees_everything():
    answers = {
        ("Arrived", "r0"): [Prefill("r0", 0, "i0")],
        ("Prefilled", "r0"): [Abort("r0", Outcome.CANCELLED, "left")],
    }
    made = cluster([Call(0.0, 50, 9)])
    log = played(answers, made)
    assert Finished(1.0, "r0", 1, Outcome.CANCELLED) in log
    assert made.engines["i0"].residents.free == 100
    assert not made.jobs


def test_a_move_to_a_lost_instance_is_refused_and_the_request_goes_on():
    flow = Flow("r0", 1, "i1", Move.OPERATOR)
    answers = {("Arrived", "r0"): [Prefill("r0", 0, "i0")], ("Prefilled", "r0"): [flow]}
    gone = [Lost(0.5, "i1", "killed")]
    log = played(answers, cluster([Call(0.0, 50, 4)], Sliders(1, 1, 100, 100), happenings=gone))
    assert [e.leg for e in log if isinstance(e, Refused)] == [1]
    assert log[-1] == Finished(4.0, "r0", 4)


def test_told_to_flow_with_its_last_token_in_flight_it_goes_on_at_the_target_if_the_source_is_lost():
    flow = Flow("r0", 1, "i1", Move.OPERATOR)
    answers = {("Arrived", "r0"): [Prefill("r0", 0, "i0")], ("Prefilled", "r0"): [flow]}
    gone = [Lost(1.5, "i0", "killed")]
    log = played(answers, cluster([Call(0.0, 50, 2)], Sliders(1, 1, 100, 100), happenings=gone))
    # The second token was to be out at 2. It is computed again, with the prompt and the first one.
    assert Flowed(2.5, "r0", 1, "i1", 2, 0, 2.5) in log
    assert log[-1] == Finished(2.5, "r0", 2)


def test_a_token_in_flight_of_a_preempted_request_is_not_out_when_its_instance_is_lost():
    answers = {
        ("Arrived", "r0"): [Prefill("r0", 0, "i0")],
        ("Arrived", "r1"): [Prefill("r1", 0, "i0")],
        ("Lost", "i0"): [Decode("r0", 1, "i1", Move.RESCUE), Prefill("r1", 1, "i1")],
    }
    calls = [Call(0.0, 30, 10), Call(0.0, 30, 10)]
    made = cluster(calls, Sliders(1, 1, 100, 100), kv=64, happenings=[Lost(2.5, "i0", "killed")])
    log = played(answers, made)
    # At 2 the first token of r1 is in flight, and r1 is taken out of the step after that to make room for r0.
    assert [(e.request, e.output_tokens) for e in log if isinstance(e, Flowed)] == [("r0", 3)]
    assert [(e.request, e.leg) for e in log if isinstance(e, Prefilled)] == [("r0", 0), ("r1", 1)]
    assert [e.output_tokens for e in log if isinstance(e, Finished)] == [10, 10]
    assert not made.jobs


def test_a_silent_instance_stands_still_and_then_goes_on():
    answers = {("Arrived", "r0"): [Prefill("r0", 0, "i0")]}
    still = [Silent(1.5, "i0"), Silent(7.0, "i0", on=False)]
    log = played(answers, cluster([Call(0.0, 50, 3)], happenings=still))
    # The step that was to end at 2 ends as soon as it goes on.
    assert [(type(e).__name__, e.at) for e in log[2:]] == [
        ("Prefilled", 1.0), ("Silent", 1.5), ("Silent", 7.0), ("Stepped", 7.0), ("Stepped", 8.0),
        ("Finished", 8.0),
    ]  # fmt: skip


def test_a_prompt_that_is_placed_anew_is_not_computed_where_it_was():
    answers = {
        ("Arrived", "r0"): [Prefill("r0", 0, "i0", hand_over=True)],
        ("Silent", "i0"): [Prefill("r0", 1, "i1")],
    }
    still = [Silent(0.5, "i0"), Silent(5.0, "i0", on=False)]
    made = cluster([Call(0.0, 50, 2)], Sliders(1, 1, 100, 100), happenings=still)
    log = played(answers, made)
    assert [e for e in log if isinstance(e, Prefilled)] == [Prefilled(1.5, "r0", 1, "i1")]
    assert log[-1] == Stepped(5.0, "i0", 1.0, 50, 0, 0)  # the step was under way, for nobody
    assert all(e.residents.free == 100 for e in made.engines.values())


def test_an_instance_comes_back_empty_and_works_again():
    answers = {
        ("Arrived", "r0"): [Prefill("r0", 0, "i0")],
        ("Joined", "i0"): [Prefill("r0", 1, "i0")],
    }
    days = [Lost(0.5, "i0", "killed"), Joined(3.0, "i0", 1600)]
    log = played(answers, cluster([Call(0.0, 50, 2)], happenings=days))
    assert log[1:] == [
        *days,
        Stepped(4.0, "i0", 1.0, 50, 0, 64),
        Prefilled(4.0, "r0", 1, "i0"),
        Stepped(5.0, "i0", 1.0, 0, 1, 0),
        Finished(5.0, "r0", 2),
    ]


def test_a_prompt_for_a_lost_instance_is_refused():
    answers = {("Arrived", "r0"): [Prefill("r0", 0, "i0")]}
    log = played(answers, cluster([Call(1.0, 50, 2)], happenings=[Lost(0.5, "i0", "killed")]))
    assert log[-1] == Refused(1.0, "r0", 0, "i0 is lost")


def test_two_pulls_share_a_port_first_come_first_served():
    link = Link(bytes_per_token=2.0, bandwidth=100.0, latency=1.0)
    assert link.landing(0.0, "a", "b", 50) == 2.0
    assert link.landing(0.0, "a", "c", 50) == 3.0  # the port out of a is busy until 1
    assert link.landing(0.0, "d", "e", 50) == 2.0


def test_a_prompt_over_the_limit_is_said_by_name():
    with pytest.raises(ValueError, match=r"request r0: 1500 \+ 200 tokens are over the limit"):
        played({}, cluster([Call(0.0, 1500, 200)]))


def test_arrivals_out_of_order_are_refused():
    with pytest.raises(ValueError, match="in order of time"):
        played({}, cluster([Call(2.0, 10, 1), Call(1.0, 10, 1)]))


def test_a_queued_prompt_goes_elsewhere_while_its_instance_is_busy_and_costs_nothing_there():
    # Steps of one second and 100 tokens: r0 takes i0 until 4 s, and r1 leaves its queue when r2 comes.
    answers = {
        ("Arrived", "r0"): [Prefill("r0", 0, "i0")],
        ("Arrived", "r1"): [Prefill("r1", 0, "i0")],
        ("Arrived", "r2"): [Prefill("r1", 1, "i1"), Prefill("r2", 0, "i0")],
    }
    log = played(
        answers, cluster([Call(0.0, 400, 1), Call(0.5, 100, 1), Call(1.5, 100, 1)], Sliders(0, 2, 0, 100))
    )
    first = [(e.at, e.request, e.leg, e.instance) for e in log if isinstance(e, Prefilled)]
    assert first == [(2.5, "r1", 1, "i1"), (4.0, "r0", 0, "i0"), (5.0, "r2", 0, "i0")]
    assert Counter(e.request for e in log if isinstance(e, Finished)) == {"r0": 1, "r1": 1, "r2": 1}


# ------------------------------------------------------------------------------- with the real policies


def served(seed, requests=60, sliders=TWO_AND_TWO, kv=3200, rate=40.0, happenings=(), log=None):
    chance = random.Random(seed)
    at, calls = 0.0, []
    for _ in range(requests):
        at += chance.expovariate(rate)
        calls.append(Call(at, chance.randint(1, 700), chance.randint(1, 120)))
    made = cluster(calls, sliders, kv, 0.002, happenings, LINEAR)
    scheduler = GlobalScheduler(sliders, SLO(0.5, 0.03), Learned(), Policy(), made.capacities)

    @dataclass
    class Kept:
        def on(self, event):
            commands = scheduler.on(event)
            if log is not None:
                log.append(encode(event, commands))
            return commands

    return calls, made, scheduler, Kept()


def test_the_same_seed_gives_the_same_log_byte_for_byte():
    logs: list[list[str]] = [[], []]
    for log in logs:
        _, made, _, kept = served(7, log=log)
        run(kept, made)
    assert "\n".join(logs[0]) == "\n".join(logs[1])
    assert len(logs[0]) > 300


def test_under_overload_prompts_go_elsewhere_and_everybody_is_served_or_turned_away_once():
    moved = 0
    for seed in range(8):
        calls, made, *_ = served(seed, 120, rate=60.0)
        policy = Policy(overload=DEMOTE)
        scheduler = GlobalScheduler(TWO_AND_TWO, SLO(0.5, 0.1), Learned(), policy, made.capacities)
        ends: Counter[str] = Counter()
        for event in made.facts():
            commands = scheduler.on(event)
            if isinstance(event, Prefilled):
                moved += sum(isinstance(command, Prefill) for command in commands)
            if isinstance(event, Finished):
                ends[event.request] += 1
            for command in commands:
                made.send(command)
        assert set(ends.values()) == {1}
        assert len(ends) == len(calls)
        assert not scheduler.requests
    assert moved > 0


async def test_drive_and_run_are_the_same_loop():
    logs: list[list[str]] = [[], []]
    _, made, _, kept = served(8, log=logs[0])
    run(kept, made)
    _, made, _, kept = served(8, log=logs[1])
    await drive(kept, made)
    assert logs[0] == logs[1]


@settings(max_examples=40, deadline=None)
@example(seed=213, sliders=Sliders(2, 1, 1024, 0), kv=6400, lost=True)  # told to flow, and its source is lost
@example(seed=7385, sliders=Sliders(2, 1, 1024, 0), kv=1024, lost=False)  # those that landed fill the cache
@given(
    seed=st.integers(0, 10_000),
    sliders=st.sampled_from([Sliders(0, 3, 0, 128), Sliders(2, 2, 512, 64), Sliders(2, 1, 1024, 0)]),
    kv=st.sampled_from([1024, 1600, 6400]),
    lost=st.booleans(),
)
def test_no_request_is_lost_or_doubled_and_all_blocks_come_back(seed, sliders, kv, lost):
    gone = [Lost(0.7, f"i{sliders.instances - 1 if sliders.p_heavy == 0 else 0}", "killed")] if lost else []
    calls, made, scheduler, kept = served(seed, 40, sliders, kv, happenings=gone)
    seen: Counter[str] = Counter()
    tokens: dict[str, int] = {}
    for event in made.facts():
        for command in kept.on(event):
            made.send(command)
        if isinstance(event, Finished):
            seen[event.request] += 1
            tokens[event.request] = event.output_tokens
    assert seen == Counter(f"r{n}" for n in range(len(calls)))
    assert tokens == {f"r{n}": call.output_tokens for n, call in enumerate(calls)}
    assert not made.jobs
    assert not scheduler.requests
    for engine in made.engines.values():
        if engine.alive:
            assert engine.residents.free == engine.residents.blocks
            assert (engine.residents.decodes, engine.residents.context) == (0, 0)
            ledger = scheduler.instances[engine.name]
            assert (ledger.decodes, ledger.arriving, ledger.queued_tokens) == (0, 0, 0)


def test_the_ledger_of_the_scheduler_agrees_with_the_engines_all_along():
    _, made, scheduler, kept = served(3, 60, kv=64_000)
    for event in made.facts():
        for command in kept.on(event):
            made.send(command)
        if isinstance(event, Stepped):
            told = sum(i.decodes + i.arriving + i.queued_requests for i in scheduler.instances.values())
            assert told == len(scheduler.requests)
            # What ended in this very step is told right after it.
            assert set(made.jobs) <= set(scheduler.requests)
            assert made.capacities[event.instance] >= event.kv_tokens >= 0
