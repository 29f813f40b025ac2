"""Which engine requests are behind an id: those of one client's request, whatever else looks like it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from taichi_serve.frontend.names import Names, asking, find


def ask(names: Names, response_id: str | None, *made: tuple[str, str]) -> None:
    """One HTTP request of which vLLM's route makes these engine requests (name, vLLM's name for it)."""
    state: dict[str, Any] = {}
    if response_id is not None:
        state["request_metadata"] = SimpleNamespace(request_id=response_id)
    token = asking.set(state)
    for engine_id, external in made:
        names.note(engine_id, external)
    asking.reset(token)


def test_every_prompt_and_every_choice_of_a_request_is_behind_its_id() -> None:
    names = Names()
    prompts = ("cmpl-job-0-aaaaaaaa", "cmpl-job-0"), ("cmpl-job-1-bbbbbbbb", "cmpl-job-1")
    choices = ("0_chatcmpl-x-cccccccc", "chatcmpl-x"), ("1_chatcmpl-x-cccccccc", "chatcmpl-x")
    ask(names, "cmpl-job", *prompts)
    ask(names, "chatcmpl-x", *choices)
    assert names.behind("cmpl-job") == [[name for name, _ in prompts]]
    assert names.behind("chatcmpl-x") == [[name for name, _ in choices]]


def test_an_id_that_begins_like_another_is_another() -> None:
    names = Names()
    ask(names, "cmpl-job", ("cmpl-job-0-aaaaaaaa", "cmpl-job-0"))
    ask(names, "cmpl-job-2", ("cmpl-job-2-0-bbbbbbbb", "cmpl-job-2-0"))
    assert names.behind("cmpl-job") == [["cmpl-job-0-aaaaaaaa"]]
    assert names.behind("cmpl-job-2") == [["cmpl-job-2-0-bbbbbbbb"]]
    assert names.behind("cmpl") == []
    assert names.behind("job") == []


def test_an_id_that_was_used_twice_is_two_requests_the_newest_first() -> None:
    names = Names()
    ask(names, "cmpl-twin", ("cmpl-twin-0-aaaaaaaa", "cmpl-twin-0"))
    ask(names, "cmpl-twin", ("cmpl-twin-0-bbbbbbbb", "cmpl-twin-0"))
    assert names.behind("cmpl-twin") == [["cmpl-twin-0-bbbbbbbb"], ["cmpl-twin-0-aaaaaaaa"]]


@pytest.mark.parametrize("asked", ["cmpl-a/b c%2F", "cmpl-jÃ¶b", "cmpl-한국어"])
def test_an_id_may_have_any_character(asked: str) -> None:
    names = Names()
    ask(names, asked, ("engine", "external"))
    assert names.behind(asked) == [["engine"]]


def test_an_id_in_a_header_may_be_spelled_as_the_client_wrote_it() -> None:
    names = Names()
    ask(names, "cmpl-jÃ¶b", ("engine", "external"))  # UTF-8, read as Latin-1
    assert names.behind("cmpl-jöb") == [["engine"]]


def test_where_a_route_names_no_id_vllms_own_name_counts() -> None:
    names = Names()
    ask(names, None, ("decision-1-aaaaaaaa", "decision-1"))
    names.note("generative-scoring-7-0-bbbbbbbb", "generative-scoring-7-0")  # outside of any HTTP request
    assert names.behind("decision-1") == [["decision-1-aaaaaaaa"]]
    assert names.behind("generative-scoring-7-0") == [["generative-scoring-7-0-bbbbbbbb"]]


def test_only_the_last_requests_are_kept() -> None:
    names = Names(keep=2)
    for number in range(3):
        ask(names, f"cmpl-{number}", (f"engine{number}", "external"))
    assert [len(names.behind(f"cmpl-{number}")) for number in range(3)] == [0, 1, 1]


LOGGED = [
    "cmpl-job-0-aaaaaaaa",
    "cmpl-job-1-aaaaaaab",
    "0_cmpl-job-2-aaaaaaac",
    "cmpl-job-2-0-bbbbbbbb",
    "chatcmpl-job-cccccccc",
    "chatcmpl-job-2-dddddddd",
    "0_chatcmpl-many-eeeeeeee",
    "1_chatcmpl-many-eeeeeeee",
    "chatcmpl-batch_0-ffffffff",
    "chatcmpl-batch_1-ffffffff",
]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("cmpl-job", LOGGED[:3]),
        ("cmpl-job-2", [LOGGED[3]]),
        ("cmpl-job-1", [LOGGED[1]]),
        ("chatcmpl-job", [LOGGED[4]]),
        ("chatcmpl-job-2", [LOGGED[5]]),
        ("chatcmpl-many", LOGGED[6:8]),
        ("chatcmpl-batch", LOGGED[8:]),
        (LOGGED[0], [LOGGED[0]]),
        ("cmpl", []),
        ("cmpl-.*", []),
    ],
)
def test_in_a_log_an_id_is_found_by_name(asked: str, found: list[str]) -> None:
    assert find(asked, LOGGED) == found
