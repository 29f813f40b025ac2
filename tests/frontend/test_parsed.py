"""What a parsed body may not say, in whatever way it is written."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from taichi_serve.frontend.parsed import MAX_DEPTH, Refusal, parse

KV = "kv_transfer_params"


@pytest.mark.parametrize(
    "body",
    [
        {KV: {"do_remote_prefill": True}},
        {"ec_transfer_params": {}},
        {"data_parallel_rank": 0},
        {KV: False},
        {"vllm_xargs": {KV: "x"}},
        {"vllm_xargs": {"taichi": "moved"}, "stream": True},
        {"sampling_params": {"extra_args": {"taichi": 1}}},
        {"sampling_params": {"extra_args": {KV: {}}}},
        b'{"\\u006bv_transfer_params": {"a": 1}}',
        b'{"vllm_xargs": {"\\u0074aich\\u0069": 1}}',
        b'{"kv_transfer_params": null, "kv_transfer_params": {"a": 1}}',
        b'\xef\xbb\xbf{"kv_transfer_params": 1}',
        b' \n\t{"kv_transfer_params"\n:\t1}',
    ],
    ids=str,
)
def test_what_only_this_system_may_say_is_refused(body: Any) -> None:
    with pytest.raises(Refusal, match="cannot be set by a client") as refusal:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert refusal.value.parameter in {KV, "ec_transfer_params", "data_parallel_rank", "taichi"}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "what are kv_transfer_params?"},
        {"prompt": 'she wrote "kv_transfer_params": 1 and more'},
        {KV: None},
        {"taichi": "ignored by vLLM, as every unknown word is"},
        {"vllm_xargs": {"taichi_like": 1}},
        {"vllm_xargs": ["taichi"]},
        {"tools": [{"function": {"parameters": {"properties": {"taichi": {}, KV: {}}}}}]},
        [KV],
        KV,
        7,
        None,
        b'{"kv_transfer_params": {"a": 1}, "kv_transfer_params": null}',
        b'\xef\xbb\xbf{"prompt": "with a byte order mark"}',
    ],
    ids=str,
)
def test_words_that_only_look_like_it_get_in(body: Any) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert parse(raw) == json.loads(raw)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_another_encoding_never_gets_past_the_look(encoding: str) -> None:
    body = json.dumps({KV: {"a": 1}}).encode(encoding)
    with pytest.raises((Refusal, json.JSONDecodeError)):
        parse(body)


def test_bytes_that_are_not_utf_8_are_named() -> None:
    with pytest.raises(Refusal, match=r"not UTF-8.*byte 12"):
        parse(b'{"prompt": "\xff"}')


@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a":', "}")])
def test_the_depth_has_a_limit(opens: str, closes: str) -> None:
    def nested(levels: int) -> bytes:
        return (opens * levels + "1" + closes * levels).encode()

    parse(nested(MAX_DEPTH))
    for levels in (MAX_DEPTH + 1, 900, 200_000):
        with pytest.raises(Refusal, match=f"more than {MAX_DEPTH} levels"):
            parse(nested(levels))


def test_brackets_in_a_text_are_no_depth() -> None:
    text = "[" * 10_000 + "{" * 10_000
    assert parse(json.dumps({"prompt": text}).encode()) == {"prompt": text}
    wide = {"prompt": [[1, 2], [3]] * 5_000}
    assert parse(json.dumps(wide).encode()) == wide


def test_a_number_of_very_many_digits_is_refused() -> None:
    with pytest.raises(Refusal, match="not acceptable"):
        parse(b'{"max_tokens": ' + b"9" * 5_000 + b"}")


@pytest.mark.parametrize("text", ["\\u003a" * 2_700_000, '\\"kv_transfer_params\\": ' * 700_000])
def test_a_look_at_16_mib_costs_little_more_than_parsing_them_once(text: str) -> None:
    body = b'{"prompt": "' + text.encode() + b'"}'
    assert len(body) > 15 << 20

    def seconds(act: Any) -> float:
        best = 9.9
        for _ in range(3):
            start = time.perf_counter()
            act(body)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(parse) < 1.5 * seconds(json.loads) + 0.05
