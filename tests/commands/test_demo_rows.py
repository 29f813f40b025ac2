"""The demo's requests and its table, without a server."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from taichi_serve.bench.client import Answer
from taichi_serve.commands.rows import Row, row, totals
from taichi_serve.commands.tables import requests_table, totals_table
from taichi_serve.commands.workload import Planned, plan
from taichi_serve.slo import SLO

PROMISE = SLO(ttft=2.0, tpot=0.1)
KINDS = {"i0": "P-heavy", "i1": "D-heavy"}


def planned(output: int = 3) -> Planned:
    return Planned(0, at=0.0, chat=True, words=2, output=output, text="big book")


def answer(ttft: float = 0.5, output: int = 3) -> Answer:
    times = [10.0 + ttft + 0.05 * k for k in range(output)]
    return Answer(10.0, "chatcmpl-1", times=times, prompt_tokens=20, output_tokens=output, finish="length")


def leg(number: int, instance: str, kind: str, gap: float | None = None) -> dict[str, Any]:
    return {"leg": number, "instance": instance, "kind": kind, "gap": gap, "kv_tokens": 20 if number else 0}


HANDED_OVER = {
    "legs": [leg(0, "i0", "prefill"), leg(1, "i1", "decode", 0.04), leg(2, "i0", "decode", 0.06)],
    "log": [
        {"type": "Decode", "leg": 1, "move": "hand-over"},
        {"type": "Flow", "leg": 2, "move": "operator"},
    ],
}


def rendered(rows: list[Row]) -> str:
    console = Console(width=80, file=StringIO())
    console.print(requests_table(rows, KINDS, PROMISE))
    sums = totals(rows, {"moves": {"bytes": 3 << 20}})
    console.print(totals_table(sums, KINDS, PROMISE))
    file = console.file
    assert isinstance(file, StringIO)
    return file.getvalue()


def test_the_same_seed_plans_the_same_requests_and_one_of_them_is_moved_by_hand() -> None:
    requests = plan(40, 2.5, seed=1)
    assert requests == plan(40, 2.5, seed=1)
    assert [r.number for r in requests if r.by_hand] == [10]
    assert {r.chat for r in requests} == {True, False}
    assert sorted(r.at for r in requests) == [r.at for r in requests]


def test_a_plan_of_one_request_moves_that_one() -> None:
    assert plan(1, 2.5, seed=1)[0].by_hand


def test_a_row_says_where_the_request_was_and_why_it_moved() -> None:
    line = row(planned(), answer(), HANDED_OVER, PROMISE)
    assert (line.prefilled, line.decoded) == ("i0", ("i1", "i0"))
    assert [(hop.move, hop.to, hop.gap) for hop in line.hops] == [
        ("hand-over", "i1", 0.04),
        ("operator", "i0", 0.06),
    ]
    assert line.good


def test_without_a_hand_over_it_decodes_where_it_prefilled() -> None:
    line = row(planned(), answer(), {"legs": [leg(0, "i1", "prefill")], "log": []}, PROMISE)
    assert (line.prefilled, line.decoded, line.hops) == ("i1", ("i1",), ())


def test_a_late_first_token_is_not_good_and_no_failure_either() -> None:
    line = row(planned(), answer(ttft=2.5), HANDED_OVER, PROMISE)
    assert not line.good
    assert line.error is None


def test_a_lost_token_is_a_failure() -> None:
    line = row(planned(output=4), answer(output=3), HANDED_OVER, PROMISE)
    assert line.error == "3 tokens came, 4 were asked for"


def test_a_request_that_never_began_is_a_failure_and_still_a_line() -> None:
    line = row(planned(), Answer(10.0, error="HTTP 503: closing"), None, PROMISE)
    assert (line.prefilled, line.ttft, line.good) == ("-", None, False)
    assert "failed" in rendered([line])


def test_the_table_fits_80_columns_and_the_totals_add_up() -> None:
    lines = [row(planned(), answer(), HANDED_OVER, PROMISE), row(planned(), answer(3.0), None, PROMISE)]
    text = rendered(lines)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "hand-over" in text
    assert "1 of 2 (50%)" in text
    assert "hand-over 1, operator 1" in text
    assert "3.0 MiB" in text
    assert "gap of a move 50 ms" in text
