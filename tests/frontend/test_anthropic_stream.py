"""What a client of Anthropic's API sees of a stream whose request fails after it has begun."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from taichi_serve.frontend.anthropic_stream import worded

NEXT = vllm.__version_tuple__[:2] >= (0, 33)
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


def item(said: Any) -> Any:
    """It as vLLM hands it to what makes Anthropic's events: a line, or since 0.33 an object."""
    if not NEXT:
        return f"data: {said if isinstance(said, str) else json.dumps(said)}\n\n"
    kind = ErrorResponse if "error" in said else ChatCompletionStreamResponse
    return kind.model_validate(said)


async def events(*said: Any) -> list[tuple[str, Any]]:
    """What becomes of a stream of OpenAI's route."""

    async def stream() -> AsyncGenerator[str, None]:
        for one in said:
            if one != "[DONE]" or isinstance(item(CHUNK), str):  # objects are over when they are over
                yield item(one)

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
    whole = ["content_block_stop"] if NEXT else []  # since 0.33 the block is ended, too
    assert [event for event, _ in before][:3] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
    ]
    assert [event for event, _ in before][3:] == whole
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
