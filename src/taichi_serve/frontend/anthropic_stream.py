"""Streams of Anthropic's route whose request fails after they have begun: the last event says why.

vLLM makes them of its own streams for OpenAI's route. It takes an error in one of those for a chunk that it
cannot read, so that a client would get a page about fields that are missing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

from taichi_serve.frontend.anthropic_form import reworded

BEGINS = 'data: {"error"'  # what vLLM says last in a stream that fails
FAILED = "event: error\n"


@contextlib.contextmanager
def worded() -> Iterator[None]:
    """While this lasts, such streams end with an error in Anthropic's form."""
    vllms_own = AnthropicServingMessages.message_stream_converter

    async def converter(
        self: AnthropicServingMessages, generator: AsyncGenerator[str, None]
    ) -> AsyncGenerator[str, None]:
        last = _Last()
        async for event in vllms_own(self, last.before(generator)):
            yield _event(event.partition("data: ")[2]) if event.startswith(FAILED) else event
        if last.error is not None:
            yield _event(last.error)

    AnthropicServingMessages.message_stream_converter = converter
    try:
        yield
    finally:
        AnthropicServingMessages.message_stream_converter = vllms_own


class _Last:
    """The error at the end of a stream, if there is one."""

    error: str | None = None

    async def before(self, generator: AsyncGenerator[str, None]) -> AsyncIterator[str]:
        """All that comes before it."""
        async with contextlib.aclosing(generator):
            async for item in generator:
                if item.startswith(BEGINS):
                    self.error = item.removeprefix("data: ")
                    return
                yield item


def _event(said: str) -> str:
    """What was said of an error, as an event of Anthropic's; one without a status is the server's."""
    try:
        code = json.loads(said)["error"]["code"]
    except (ValueError, LookupError, TypeError):
        code = None
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    return f"{FAILED}data: {reworded(status, said.encode()).decode()}\n\n"
