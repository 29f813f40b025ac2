"""One streamed request to an OpenAI endpoint, with the time of every token as its client saw it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from httpx_aiohttp import AiohttpTransport

from taichi_serve.bench.sse import Events
from taichi_serve.slo import tpot

DONE = "[DONE]"
# A server closes what was idle for so long (uvicorn and vLLM: 5 s). Whoever keeps a connection as long sends
# into one that is being closed, now and then, and takes that for a failed request.
IDLE = 2.0  # seconds
MANY = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE)
UNBOUNDED = httpx.Limits(max_connections=0, keepalive_expiry=IDLE)  # the same, in the words of aiohttp

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
    cached_tokens: int | None = None  # of the prompt; None where the server does not say

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


def swift() -> httpx.AsyncBaseTransport:
    """aiohttp below httpx, for clients of many streams. Its parser is compiled: a token that comes costs the
    load generator half the processor time, which on a small machine is taken from the server."""
    return AiohttpTransport(limits=UNBOUNDED, trust_env=False)


async def stream(
    client: httpx.AsyncClient,
    path: str,
    body: dict[str, Any],
    on_tokens: OnTokens | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """POST `body` with streaming on; `on_tokens` is awaited after every chunk. What the server does wrong is
    in the answer's `error`."""
    answer = Answer(time.perf_counter())
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", path, json=body, headers=headers) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode(errors="replace")
                answer.error = f"HTTP {response.status_code}: {' '.join(said.split())[:300]}"
                return answer
            async for data in _data(response):
                if _take(answer, data) and on_tokens is not None:
                    await on_tokens(answer)
    except httpx.HTTPError as wrong:
        answer.error = str(wrong) or type(wrong).__name__
    return answer


async def _data(response: httpx.Response) -> AsyncIterator[str]:
    """The data of every event up to the one that says it is the last."""
    events, over = Events(), False
    async for chunk in response.aiter_bytes():  # to its end, so that the connection can be used again
        for data in events.feed(chunk):
            over = over or data == DONE
            if not over:
                yield data


def _take(answer: Answer, data: str) -> bool:
    """Add one event; says whether it brought tokens. One that is not as OpenAI's are is the answer's error,
    and no reason to lose the others of a run."""
    try:
        body = json.loads(data)
        if body.get("error"):
            answer.error = str(body["error"])
            return False
        answer.id = str(body.get("id") or answer.id)
        if usage := body.get("usage"):
            answer.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            answer.output_tokens = int(usage.get("completion_tokens") or 0)
            if details := usage.get("prompt_tokens_details"):
                answer.cached_tokens = int(details.get("cached_tokens") or 0)
        brought = [_choice(answer, choice) for choice in body.get("choices") or () if choice]
    except (ValueError, TypeError, AttributeError, RecursionError) as wrong:
        answer.error = f"no event of a completion: {data[:100]!r} ({type(wrong).__name__})"
        return False
    return any(brought)


def _choice(answer: Answer, choice: dict[str, Any]) -> bool:
    text: str = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    tokens: list[int] = choice.get("token_ids") or []
    answer.text += text
    answer.tokens += tokens
    answer.finish = choice.get("finish_reason") or answer.finish
    if not (text or tokens):  # half of a multi-byte character brings a token and no text
        return False
    answer.times.append(time.perf_counter())
    answer.counts.append(len(tokens))
    return True
