"""One streamed request to an OpenAI endpoint, with the time of every token as its client saw it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from taichi_serve.slo import tpot

OnTokens = Callable[["Answer"], Awaitable[None]]


@dataclass(slots=True)
class Answer:
    """What came back. Times are `time.perf_counter()` seconds; `finish` stays None where it broke off."""

    sent_at: float
    id: str = ""
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of every chunk that brought tokens
    counts: list[int] = field(default_factory=list)  # tokens in it
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish: str | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it ended as it should: a stream without a finish reason is a failure."""
        return self.finish is not None and self.error is None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent_at if self.times else float("inf")

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first."""
        return tpot(self.times[0], self.times[-1], self.output_tokens) if self.times else float("inf")


async def stream(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], on_tokens: OnTokens | None = None
) -> Answer:
    """POST `body` with streaming on; `on_tokens` is awaited after every chunk. What the server does wrong is
    in the answer's `error`."""
    answer = Answer(time.perf_counter())
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                answer.error = f"HTTP {response.status_code}: {(await response.aread()).decode()[:300]}"
                return answer
            async for data in _events(response):
                if _take(answer, data) and on_tokens is not None:
                    await on_tokens(answer)
    except httpx.HTTPError as wrong:
        answer.error = f"{type(wrong).__name__}: {wrong}"
    return answer


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def _take(answer: Answer, data: dict[str, Any]) -> bool:
    """Add one chunk; says whether it brought tokens."""
    if "error" in data:
        answer.error = str(data["error"])
        return False
    answer.id = data.get("id", answer.id)
    if usage := data.get("usage"):
        answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    brought = False
    for choice in data.get("choices", ()):
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        tokens = choice.get("token_ids") or []
        answer.text += text
        answer.tokens += tokens
        answer.finish = choice.get("finish_reason") or answer.finish
        # Half of a multi-byte character brings a token and no text.
        if text or tokens:
            answer.times.append(time.perf_counter())
            answer.counts.append(len(tokens))
            brought = True
    return brought
