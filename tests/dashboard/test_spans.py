"""The spans of a request, made of its facts: where it was from when to when, and how it got there."""

from __future__ import annotations

import pytest

from taichi_serve.dashboard.span import Span, moved
from taichi_serve.dashboard.spans import Told, spans
from taichi_serve.messages import (
    Abort,
    Ahead,
    Arrived,
    Command,
    Decode,
    Event,
    Finished,
    Flow,
    Flowed,
    Forecast,
    Move,
    Outcome,
    Prefill,
    Prefilled,
    Refused,
    Timeline,
)

Rows = list[tuple[str, float, float]]

# Copied ahead while its prompt was computed, and in its target's next step.
HANDED_OVER = Timeline(
    left=10.995,
    heard=11.0,
    arrived=11.001,
    began=11.002,
    landed=11.01,
    scheduled=11.02,
    made=11.045,
    at=11.05,
    before=10.99,
    ahead=10.4,
    copied=10.9,
    copied_blocks=16,
    copy_seconds=0.02,
)
# Decided at 12.0, announced, copied ahead, and told to leave.
DEGRADED = Timeline(
    left=12.15,
    heard=12.152,
    arrived=12.153,
    began=12.154,
    landed=12.16,
    scheduled=12.17,
    made=12.19,
    at=12.2,
    ahead=12.01,
    copied=12.1,
    copied_blocks=20,
    copy_seconds=0.03,
)
FORECASTS = (Forecast("i0", 1.25, 0, True), Forecast("i1", 3.5, 900, False))


def handed_over() -> list[Event | Command]:
    """Prefilled on i0, decoded on i1 from its second token on: 5 tokens so far."""
    return [
        Arrived(10.0, "a", 2000, 50),
        Prefill("a", 0, "i0", hand_over=True, forecasts=FORECASTS, why="the only feasible one"),
        Ahead("a", 1, "i1"),
        Prefilled(11.0, "a", 0, "i0", held=True),
        Decode("a", 1, "i1", Move.HAND_OVER, why="most room"),
        Flowed(11.05, "a", 1, "i1", 2, kv_tokens=2000, gap=0.055, reused=2000, timeline=HANDED_OVER),
    ]


def rows(made: list[Span] | tuple[Span, ...]) -> Rows:
    return [(span.name, span.began, span.ended) for span in made]


def only(made: list[Span], name: str) -> Span:
    (found,) = (span for span in made if span.name == name)
    return found


def test_a_request_that_stays_has_a_prefill_and_a_decode() -> None:
    made = spans([Arrived(10.0, "a", 100, 5), Prefill("a", 0, "i1"), Prefilled(10.2, "a", 0, "i1", 64)])
    assert rows(made) == [("prefill", 10.0, 10.2)]
    assert made[0].attributes == {"taichi.instance": "i1", "taichi.leg": 0, "taichi.cached_tokens": 64}
    whole = [Arrived(10.0, "a", 100, 5), Prefill("a", 0, "i1"), Prefilled(10.2, "a", 0, "i1")]
    made = spans([*whole, Finished(11.0, "a", 5)])
    assert rows(made) == [("prefill", 10.0, 10.2), ("decode", 10.2, 11.0)]
    assert made[1].attributes == {"taichi.instance": "i1", "taichi.leg": 0, "taichi.output_tokens": 5}
    assert not any(map(moved, made))


def test_a_hand_over_begins_with_the_copying_and_has_its_parts() -> None:
    made = spans([*handed_over(), Finished(11.35, "a", 5)])
    assert rows(made) == [("prefill", 10.0, 11.0), ("hand-over", 10.4, 11.05), ("decode", 11.05, 11.35)]
    prefill, move, decode = made
    assert prefill.attributes["taichi.predicted_ttft"] == 1.25
    assert prefill.attributes["taichi.why"] == "the only feasible one"
    assert rows(move.parts) == [
        ("copy ahead", 10.4, 10.9),
        ("leave", 10.9, 10.995),
        ("tail", 10.995, 11.01),
        ("landing", 11.01, 11.05),
    ]
    assert move.attributes == {
        "taichi.leg": 1,
        "taichi.from": "i0",
        "taichi.to": "i1",
        "taichi.why": "most room",
        "taichi.kv_tokens": 2000,
        "taichi.reused_tokens": 2000,
        "taichi.gap": 0.055,
    }
    assert move.parts[2].attributes == {"taichi.blocks": 16, "taichi.copy_seconds": 0.02}
    assert decode.attributes["taichi.output_tokens"] == 4  # the first came with the prefill
    assert [span.name for span in made if moved(span)] == ["hand-over"]


def test_the_parts_of_a_move_of_a_running_decode_begin_with_its_decision() -> None:
    degraded = Flowed(12.2, "a", 2, "i0", 12, kv_tokens=2011, gap=0.05, reused=2011, timeline=DEGRADED)
    history = [*handed_over(), Flow("a", 2, "i0", Move.DEGRADE, why="i1 is full"), degraded]
    made = spans([*history, Finished(13.0, "a", 30)], Told({2: 12.0}))  # by the step of another request
    assert rows(made[1:]) == [
        ("hand-over", 10.4, 11.05),
        ("decode", 11.05, 12.15),
        ("degrade", 12.0, 12.2),
        ("decode", 12.2, 13.0),
    ]
    assert rows(made[3].parts) == [
        ("announce", 12.0, 12.01),
        ("copy ahead", 12.01, 12.1),
        ("leave", 12.1, 12.15),
        ("tail", 12.15, 12.16),
        ("landing", 12.16, 12.2),
    ]
    # 1 with the prefill, 2 to 11 on i1, 12 to 30 on i0.
    assert [span.attributes.get("taichi.output_tokens") for span in made] == [None, None, 10, None, 19]


def test_of_a_move_whose_kv_was_computed_again_there_is_a_landing_alone() -> None:
    line = Timeline(
        left=11.2, heard=11.21, arrived=11.22, began=0, landed=0, scheduled=11.25, made=11.4, at=11.41
    )
    again = Flowed(11.41, "a", 2, "i0", 4, kv_tokens=0, gap=0.2, reused=0, timeline=line)
    made = spans([*handed_over(), Flow("a", 2, "i0", Move.OPERATOR), again], Told({2: 11.1}))
    move = only(made, "operator")
    assert rows(move.parts) == [("leave", 11.1, 11.2), ("landing", 11.22, 11.41)]
    assert move.attributes["taichi.reused_tokens"] == 0


def test_a_move_without_a_timeline_has_no_parts_and_the_source_ends_where_the_gap_begins() -> None:
    back = Flowed(11.5, "a", 2, "i0", 4, kv_tokens=9, gap=0.25, reused=9)
    made = spans([*handed_over(), Flow("a", 2, "i0", Move.DRAIN), back], Told({2: 11.2}))
    assert rows(made[2:]) == [("decode", 11.05, 11.25), ("drain", 11.2, 11.5)]
    assert made[3].parts == ()


def test_queue_and_compute_are_told_apart_where_the_engine_said_when_it_began() -> None:
    history = [Arrived(10.0, "a", 100, 5), Prefill("a", 0, "i1"), Prefilled(10.5, "a", 0, "i1")]
    (prefill,) = spans(history, Told(scheduled=10.3))
    assert rows(prefill.parts) == [("queue", 10.0, 10.3), ("compute", 10.3, 10.5)]
    for nonsense in (9.0, 10.6):  # of a leg before, or of none
        assert spans(history, Told(scheduled=nonsense))[0].parts == ()


def test_a_prefix_that_was_fetched_is_copied_within_the_prefill() -> None:
    fetching = Prefill("a", 0, "i1", prefix_from="i0", prefix_tokens=512)
    came = Prefilled(10.5, "a", 0, "i1", cached=512, fetched=512, fetch=(10.1, 10.2))
    (prefill,) = spans([Arrived(10.0, "a", 600, 5), fetching, came])
    assert rows(prefill.parts) == [("fetch", 10.1, 10.2)]
    assert prefill.parts[0].attributes == {
        "taichi.from": "i0",
        "taichi.to": "i1",
        "taichi.kv_tokens": 512,
    }
    assert prefill.attributes["taichi.fetched_tokens"] == 512


def test_what_waits_for_an_instance_says_so() -> None:
    history = [Arrived(10.0, "a", 100, 5), Prefill("a", 0, "i1"), Prefilled(14.0, "a", 0, "i1")]
    assert rows(spans(history, Told({0: 13.0}))) == [("wait", 10.0, 13.0), ("prefill", 13.0, 14.0)]


def test_a_prompt_whose_instance_was_lost_is_two_prefills_of_which_one_came_to_nothing() -> None:
    history = [Arrived(10.0, "a", 9, 5), Prefill("a", 0, "i0"), Prefill("a", 1, "i1")]
    made = spans([*history, Prefilled(12.0, "a", 1, "i1")], Told({0: 10.0, 1: 11.0}))
    assert rows(made) == [("prefill", 10.0, 11.0), ("prefill", 11.0, 12.0)]
    assert made[0].wrong == "it was placed elsewhere before its first token"
    assert made[1].wrong is None


def test_a_rescue_lasts_from_the_last_token_of_the_lost_instance_to_the_next() -> None:
    rescue = Decode("a", 2, "i0", Move.RESCUE)
    back = Flowed(14.0, "a", 2, "i0", 4, kv_tokens=0, gap=2.5)
    made = spans([*handed_over(), rescue, back, Finished(15.0, "a", 6)], Told({2: 12.0}))
    assert rows(made[2:]) == [("decode", 11.05, 11.5), ("rescue", 11.5, 14.0), ("decode", 14.0, 15.0)]
    assert made[3].attributes["taichi.from"] == "i1"


def test_a_rescue_may_come_back_to_the_instance_that_was_lost() -> None:
    back = Flowed(14.0, "a", 2, "i1", 4, kv_tokens=0, gap=2.5)
    made = spans([*handed_over(), Decode("a", 2, "i1", Move.RESCUE), back], Told({2: 12.0}))
    assert rows(made[2:]) == [("decode", 11.05, 11.5), ("rescue", 11.5, 14.0)]


def test_a_refused_move_says_why_and_its_decode_goes_on() -> None:
    history = [*handed_over(), Flow("a", 2, "i0", Move.BACKFLOW), Refused(13.0, "a", 2, "no room", 8)]
    made = spans([*history, Finished(14.0, "a", 20)], Told({2: 12.0}))
    assert rows(made[2:]) == [("backflow", 12.0, 13.0), ("decode", 11.05, 14.0)]
    assert (made[2].wrong, moved(made[2])) == ("no room", False)
    assert made[3].attributes["taichi.output_tokens"] == 19


def test_a_move_that_the_end_of_its_request_overtakes_is_no_error() -> None:
    made = spans([*handed_over(), Flow("a", 2, "i0", Move.DEGRADE), Finished(12.0, "a", 50)], Told({2: 11.9}))
    degrade = only(made, "degrade")
    assert (degrade.wrong, degrade.attributes["taichi.overtaken"]) == (None, True)
    assert not moved(degrade)


def test_a_move_that_is_sent_elsewhere_is_two_of_which_one_came_to_nothing() -> None:
    history = [*handed_over()[:4], Decode("a", 1, "i1", Move.HAND_OVER), Decode("a", 2, "i2", Move.HAND_OVER)]
    came = Flowed(13.0, "a", 2, "i2", 2, kv_tokens=2000, gap=2.0, reused=2000)
    made = spans([*history, came], Told({1: 11.0, 2: 12.0}))
    assert [(span.name, span.attributes["taichi.to"], span.wrong) for span in made[1:]] == [
        ("hand-over", "i1", "it was sent elsewhere instead"),
        ("hand-over", "i2", None),
    ]


def test_a_decode_that_begins_where_its_prompt_was_computed_has_not_moved() -> None:
    history = [*handed_over()[:4], Decode("a", 1, "i0", Move.HAND_OVER, why="nobody else has room")]
    made = spans([*history, Flowed(11.1, "a", 1, "i0", 2, 0, gap=0.1, reused=2000), Finished(12.0, "a", 9)])
    assert rows(made) == [("prefill", 10.0, 11.0), ("decode", 11.1, 12.0)]


@pytest.mark.parametrize(("outcome", "wrong"), [(Outcome.FAILED, "failed"), (Outcome.CANCELLED, None)])
def test_a_request_that_ends_before_its_first_token_has_a_prefill_all_the_same(
    outcome: Outcome, wrong: str | None
) -> None:
    history = [Arrived(10.0, "a", 9, 5), Prefill("a", 0, "i0"), Abort("a", outcome, "because")]
    made = spans([*history, Finished(11.0, "a", 0, outcome)])
    assert [(span.name, span.ended, span.wrong) for span in made] == [("prefill", 11.0, wrong)]


def test_a_request_that_is_turned_away_waited_in_vain() -> None:
    made = spans([Arrived(10.0, "a", 9, 5), Finished(10.1, "a", 0, Outcome.REFUSED)])
    assert [(span.name, span.wrong) for span in made] == [("wait", "refused")]


def test_a_history_that_lost_its_beginning_tells_what_is_whole() -> None:
    made = spans([Flowed(11.5, "a", 2, "i0", 4, 9, gap=0.25, reused=9), Finished(12.0, "a", 10)])
    assert rows(made) == [("decode", 11.5, 12.0)]
    assert spans([]) == []


def test_a_fact_of_a_leg_that_is_over_changes_nothing() -> None:
    history = [Arrived(10.0, "a", 9, 5), Prefill("a", 0, "i0"), Prefill("a", 1, "i1")]
    late = Prefilled(11.5, "a", 0, "i0")  # i0 was silent, and said it all the same
    made = spans([*history, late, Prefilled(12.0, "a", 1, "i1")], Told({0: 10.0, 1: 11.0}))
    assert [(span.ended, span.attributes["taichi.instance"]) for span in made] == [(11.0, "i0"), (12.0, "i1")]
