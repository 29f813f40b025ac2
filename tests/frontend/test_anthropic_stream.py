"""What a client of Anthropic's API sees of a stream whose request fails after it has begun."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

from taichi_serve.frontend.anthropic_stream import worded

CHUNK = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "tiny",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "hi"}, "finish_reason": None}],
}
LOST = "two instances died while they computed this request; i1: killed by SIGKILL."


def failed(code: int, kind: str, message: str) -> dict[str, Any]:
    """vLLM's last word in a stream of OpenAI's route."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def events(*said: Any) -> list[tuple[str, Any]]:
    """What becomes of a stream of OpenAI's route."""

    async def stream() -> AsyncGenerator[str, None]:
        for one in said:
            yield f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n"

    serving = object.__new__(AnthropicServingMessages)
    found = []
    with worded():
        async for event in serving.message_stream_converter(stream()):
            name, _, data = event.removeprefix("event: ").partition("\ndata: ")
            assert data.endswith("\n\n")
            found.append((name, json.loads(data)))
    return found


@pytest.mark.parametrize(
    ("code", "kind", "expected"),
    [
        (500, "InternalServerError", "api_error"),
        (503, "ServiceUnavailableError", "overloaded_error"),
        (400, "BadRequestError", "invalid_request_error"),
    ],
)
async def test_a_request_that_fails_in_its_stream_ends_it_with_the_reason(
    code: int, kind: str, expected: str
) -> None:
    *before, (name, error) = await events(CHUNK, CHUNK, failed(code, kind, LOST), "[DONE]")
    assert [event for event, _ in before] == ["message_start", "content_block_start", "content_block_delta"]
    assert (name, error) == ("error", {"type": "error", "error": {"type": expected, "message": LOST}})


async def test_one_that_fails_before_its_first_token_too() -> None:
    ((name, error),) = await events(failed(500, "InternalServerError", LOST), "[DONE]")
    assert (name, error["error"]["message"]) == ("error", LOST)


async def test_what_vllm_itself_cannot_read_is_an_error_of_the_server() -> None:
    *_, (name, error) = await events(CHUNK, {"no": "chunk"})
    assert (name, error["type"], error["error"]["type"]) == ("error", "error", "api_error")
    assert "ChatCompletionStreamResponse" in error["error"]["message"]


async def test_a_stream_that_ends_well_is_as_it_was() -> None:
    end = {**CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    usage = {**CHUNK, "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}}
    names = [name for name, _ in await events(CHUNK, end, usage, "[DONE]")]
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]
    assert "error" not in names
