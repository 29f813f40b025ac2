"""Streams of Anthropic's route whose request fails after they have begun: the last event says why.

vLLM makes them of its own streams for OpenAI's route. It takes an error in one of those for a chunk that it
cannot read, so that a client would get a page about fields that are missing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

from taichi_serve.cluster.vllm.moved import error_of
from taichi_serve.frontend.anthropic_form import reworded

FAILED = "event: error\n"


@contextlib.contextmanager
def worded() -> Iterator[None]:
    """While this lasts, such streams end with an error in Anthropic's form."""
    vllms_own = AnthropicServingMessages.message_stream_converter

    async def converter(
        self: AnthropicServingMessages, generator: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[str, None]:
        last = _Last()
        async for event in vllms_own(self, last.before(generator)):
            yield _event(last.said(event)) if event.startswith(FAILED) else event
        if last.error is not None:
            yield _event(last.error)

    AnthropicServingMessages.message_stream_converter = converter
    try:
        yield
    finally:
        AnthropicServingMessages.message_stream_converter = vllms_own


class _Last:
    """The error at the end of a stream, if there is one that vLLM has not told the client of."""

    error: str | None = None

    async def before(self, generator: AsyncGenerator[Any, None]) -> AsyncIterator[Any]:
        """All that comes before it; and itself where vLLM knows it for what it is."""
        async with contextlib.aclosing(generator):
            async for item in generator:
                if (error := error_of(item)) is not None:  # what vLLM says last in a stream that fails
                    self.error = error
                    if isinstance(item, str):
                        return
                yield item

    def said(self, event: str) -> str:
        """What an event of vLLM's says of an error, in the words of the error if there was one."""
        error, self.error = self.error, None
        return event.partition("data: ")[2] if error is None else error


def _event(said: str) -> str:
    """What was said of an error, as an event of Anthropic's; one without a status is the server's."""
    try:
        code = json.loads(said)["error"]["code"]
    except (ValueError, LookupError, TypeError):
        code = None
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    return f"{FAILED}data: {reworded(status, said.encode()).decode()}\n\n"
