"""The parts of a move, from records made by hand: milliseconds since the source made its last token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from taichi_serve.commands import timeline
from taichi_serve.commands.timeline import bars, draw, length, moves, view, without

CLOCK = 5000.0  # the cluster's clock when the source made its last token

# In milliseconds. The target runs a step of its own until 5, and reads what is missing at once.
COPIED_AHEAD = {
    "ahead": -9, "copied": -2, "left": 0, "heard": 0.5, "began": 0.75, "landed": 1.5, "arrived": 1,
    "scheduled": 5, "made": 8, "at": 8.5,
}  # fmt: skip
# Nothing is copied before the request has come, and it waits for the end of two steps.
PULLED = {
    "left": 0,
    "heard": 0.5,
    "arrived": 1,
    "began": 5,
    "landed": 7,
    "scheduled": 10,
    "made": 13,
    "at": 14,
}


def clock(parts: dict[str, float]) -> dict[str, float]:
    """As a server would report it."""
    return {name: CLOCK + at / 1000 for name, at in parts.items()}


def shown(times: dict[str, float]) -> list[tuple[str, str, float, float]]:
    """The bars in milliseconds."""
    return [(b.row, b.name, round(b.start * 1000, 3), round(b.end * 1000, 3)) for b in bars(times)]


def record(*legs: tuple[str, dict[str, float] | None]) -> dict[str, Any]:
    """A request that prefilled on i0 and then went to and fro, for these reasons."""
    rows: list[dict[str, Any]] = [{"leg": 0, "instance": "i0", "gap": None, "kv_tokens": 0}]
    log: list[dict[str, Any]] = [{"type": "Prefill", "leg": 0, "on": "i0"}]
    for number, (why, times) in enumerate(legs, start=1):
        rows.append(
            {"leg": number, "instance": f"i{number % 2}", "gap": 0.01, "kv_tokens": 300, "timeline": times}
        )
        log.append({"type": "Flow", "leg": number, "move": why})
    return {"id": "a", "legs": rows, "log": log}


def test_what_was_copied_ahead_lies_before_zero_and_the_parts_after_it_add_up_to_the_gap() -> None:
    assert shown(clock(COPIED_AHEAD)) == [
        ("server", "heard by the server", 0, 0.5),
        ("target", "copied ahead", -9, -2),
        ("server", "sent to the target", 0.5, 1),
        ("target", "copy of the tail", 0.75, 1.5),
        ("target", "waits for the running step to end", 1.5, 5),
        ("target", "step", 5, 8),
        ("server", "heard by the server", 8, 8.5),
    ]


def test_the_wait_begins_when_the_tail_is_there_though_the_engine_has_yet_to_take_the_request_in() -> None:
    times = clock(COPIED_AHEAD | {"landed": 0.9, "arrived": 4.5})
    assert ("target", "waits for the running step to end", 0.9, 5) in shown(times)
    lost = times | {"began": 0.0, "landed": 0.0}  # the tail never came
    assert ("target", "waits for the running step to end", 4.5, 5) in shown(lost)


def test_a_copy_after_arrival_divides_the_wait_in_two() -> None:
    assert shown(clock(PULLED)) == [
        ("server", "heard by the server", 0, 0.5),
        ("server", "sent to the target", 0.5, 1),
        ("target", "copy", 5, 7),
        ("target", "waits for the running step to end", 1, 5),
        ("target", "waits for the running step to end", 7, 10),
        ("target", "step", 10, 13),
        ("server", "heard by the server", 13, 14),
    ]


def test_what_is_read_within_the_step_has_no_bar_of_its_own_and_takes_nothing_from_the_wait() -> None:
    names = [name for _, name, *_ in shown(clock(PULLED | {"began": 10.01, "landed": 10.01}))]
    assert names == [
        *("heard by the server", "sent to the target", "waits for the running step to end", "step"),
        "heard by the server",
    ]


def test_a_part_that_does_not_apply_is_left_out() -> None:
    times = clock(COPIED_AHEAD) | {"ahead": 0.0, "copied": 0.0, "began": 0.0, "landed": 0.0}
    assert {name for _, name, *_ in shown(times)} == {
        *("heard by the server", "sent to the target", "waits for the running step to end", "step")
    }


def test_where_no_block_was_left_to_copy_ahead_there_is_no_bar_but_the_tail_is_still_a_tail() -> None:
    names = [name for _, name, *_ in shown(clock(COPIED_AHEAD | {"ahead": -2.003, "copied": -2}))]
    assert "copied ahead" not in names
    assert "copy of the tail" in names


def test_without_a_last_word_of_the_source_time_begins_when_the_server_had_its_last_token() -> None:
    times = clock(PULLED) | {"left": 0.0}
    assert shown(times)[0] == ("server", "sent to the target", 0, 0.5)


@pytest.mark.parametrize(
    ("taken", "left"),
    [
        ((2.0, 3.0), [(1.0, 2.0), (3.0, 5.0)]),
        ((0.0, 2.0), [(1.0, 0.0), (2.0, 5.0)]),  # the first ends before it begins: nothing
        ((4.0, 9.0), [(1.0, 4.0), (9.0, 5.0)]),
        ((6.0, 9.0), [(1.0, 5.0), (9.0, 5.0)]),
        ((0.0, 0.0), [(1.0, 5.0)]),
    ],
)
def test_what_is_left_of_a_span(taken: timeline.Span, left: list[timeline.Span]) -> None:
    assert without((1.0, 5.0), taken) == left


def test_every_move_has_its_reason_its_instances_and_its_gap() -> None:
    found = moves(record(("hand-over", clock(COPIED_AHEAD)), ("operator", None), ("rescue", clock(PULLED))))
    assert [(move.leg, move.why, move.source, move.target) for move in found] == [
        (1, "hand-over", "i0", "i1"),
        (3, "rescue", "i0", "i1"),
    ]
    assert found[0].gap == pytest.approx((0.0005, 0.0085))
    # A lost source said nothing of its last token: what stands there is older.
    assert found[1].gap == pytest.approx((0.0, 0.0135))


def test_what_was_copied_long_before_is_cut_off_so_that_the_gap_can_be_seen() -> None:
    (near,) = moves(record(("operator", clock(COPIED_AHEAD | {"ahead": -4}))))
    (far,) = moves(record(("operator", clock(COPIED_AHEAD | {"ahead": -4000}))))
    assert view(near) == pytest.approx((-0.004 - 0.16 * 0.0125, 0.0085 + 0.16 * 0.0125))
    start, end = view(far)
    assert start == pytest.approx(-0.8 * 0.0085 - 0.16 * 1.8 * 0.0085)
    assert end > 0.0085


@pytest.mark.parametrize("suffix", timeline.SUFFIXES)
def test_the_picture_names_every_part_with_its_milliseconds(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moves{suffix}"
    draw(moves(record(("operator", clock(COPIED_AHEAD)), ("drain", clock(PULLED)))), "request a", path)
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        comments = path.read_text()  # text is drawn as paths, and said in comments
        for said in (
            "copied ahead 7.00 ms",
            "copy of the tail 0.75 ms",
            "copy 2.00 ms",
            "gap 8.00 ms",
            "source i1",
        ):
            assert said in comments
        assert "operator from i0 to i1: 300 tokens of KV came over" in comments


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.25, "250 ms"), (0.0123, "12.3 ms"), (0.00123, "1.23 ms"), (0.0, "0.00 ms")]
)
def test_lengths_have_three_digits(seconds: float, said: str) -> None:
    assert length(seconds) == said
