"""Server-sent events as the standard has them, however the bytes were cut."""

import json
from itertools import pairwise

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taichi_serve.bench.client import stream
from taichi_serve.bench.sse import Events


def read(*chunks):
    events = Events()
    return [data for chunk in chunks for data in events.feed(chunk)]


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("data: a\n\n", ["a"]),
        ("data:a\n\n", ["a"]),
        ("data:  a\n\n", [" a"]),  # one space belongs to the field, a second one to the data
        ("data: a\r\n\r\n", ["a"]),
        ("data: a\r\rdata: b\r\r", ["a", "b"]),
        ("data: a\ndata: b\n\n", ["a\nb"]),
        ("data\n\n", [""]),  # a field without a colon has an empty value
        ("\n\n: a comment\n\n", []),
        (": keep-alive\ndata: a\nevent: message\nid: 7\nretry: 10\n\n", ["a"]),
        ("\N{ZERO WIDTH NO-BREAK SPACE}data: a\n\n", ["a"]),  # a byte order mark
        ("data: a\n\n\N{ZERO WIDTH NO-BREAK SPACE}data: b\n\n", ["a"]),  # only the first is one
        ("data: a\u2028b\u2029c\x85d\x0be\n\n", ["a\u2028b\u2029c\x85d\x0be"]),
        ("data: a\n\ndata: cut", ["a"]),
        ("data: a\n\ndata: cut\n", ["a"]),
        ("datum: a\n data: b\nDATA: c\n\n", []),
    ],
)
def test_lines_fields_and_ends_are_those_of_the_standard(text, data):
    assert read(text.encode()) == data
    assert read(*(bytes([byte]) for byte in text.encode())) == data


def test_an_event_is_there_as_soon_as_its_last_line_end_is():
    events = Events()
    assert list(events.feed(b"data: a\r\n\r")) == ["a"]
    assert list(events.feed(b"\ndata: b\n")) == []
    assert list(events.feed(b"\n")) == ["b"]


WORDS = st.text(st.sampled_from("ab:{ \u2028\u2029\x85\x0b\x0c\x1c\ufeff\N{GRINNING FACE}ß"), max_size=8)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
LINES = st.one_of(WORDS.map("data: {}".format), WORDS.map("data:{}".format), WORDS.map(": {}".format))
STREAMS = st.lists(st.tuples(LINES, ENDS, st.sampled_from(["", "\n", "\r", "\r\n"])), max_size=8)


@given(STREAMS, st.lists(st.integers(0, 400)))
def test_where_the_bytes_are_cut_makes_no_difference(lines, cuts):
    whole = ("".join(line + end + blank for line, end, blank in lines) + "\n\n").encode()
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[a:b] for a, b in pairwise(places)]
    assert read(*pieces) == read(whole)


@given(st.lists(st.tuples(st.lists(WORDS, min_size=1, max_size=3), ENDS), max_size=5))
def test_what_was_sent_is_what_is_read(events):
    raw = "".join("".join(f"data: {word}{end}" for word in words) + end for words, end in events)
    assert read(raw.encode()) == ["\n".join(words) for words, _ in events]


# ------------------------------------------------------------------------------- in the load's client


async def answered(*chunks, status=200):
    async def body():
        for chunk in chunks:
            yield chunk

    transport = httpx.MockTransport(lambda request: httpx.Response(status, content=body()))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await stream(client, "/v1/completions", {})


def sent(text, tokens, finish=None):
    return {"id": "a", "choices": [{"text": text, "token_ids": tokens, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}


def raw(*bodies, head="data: ", end="\n\n"):
    texts = (json.dumps(body, ensure_ascii=False) for body in bodies)
    return "".join(f"{head}{text}{end}" for text in texts).encode()


BODIES = sent("a\u2028b", [1]), sent("\x85", [2, 3]), sent("", [4], "length"), USAGE


@pytest.mark.parametrize(
    "whole",
    [
        raw(*BODIES) + b"data: [DONE]\n\n",
        raw(*BODIES, head="data:", end="\r\n\r\n") + b"data:[DONE]\r\n\r\n",
        b"\xef\xbb\xbf: hello\n\n" + raw(*BODIES, end="\r\r") + b"data: [DONE]\r\rdata: {}\r\r",
        raw(BODIES[0], {"choices": None}, {"choices": [None], "usage": None, "error": None}, *BODIES[1:]),
    ],
)
async def test_an_odd_but_legal_stream_breaks_no_figure(whole):
    for answer in await answered(whole), await answered(*(bytes([byte]) for byte in whole)):
        assert (answer.error, answer.text, answer.finish, answer.id) == (None, "a\u2028b\x85", "length", "a")
        assert (answer.tokens, answer.counts, answer.output_tokens) == ([1, 2, 3, 4], [1, 2, 1], 4)
        assert len(answer.times) == 3


@pytest.mark.parametrize(
    "data", ["{", "7", "[1]", '{"choices": 7}', '{"choices": [{"text": 7}]}', "[" * 9999]
)
async def test_a_stream_of_something_else_is_an_error_of_one_answer(data):
    answer = await answered(f"data: {data}\n\n".encode())
    assert answer.error.startswith("no event of a completion: ")
    assert not answer.ok


async def test_a_refusal_that_is_no_text_is_one_line():
    answer = await answered(b"\xff\n\n<html>", status=502)
    assert answer.error == "HTTP 502: \ufffd <html>"
