"""The look at what a client said: at the very object that the application parsed, so nothing is parsed twice.

A name can be spelled with escapes, a body can be UTF-16 or have a name twice; whoever searched the bytes
would have to parse like the application, and to hold the event loop once more for it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from fastapi import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from taichi_serve.frontend.errors import error
from taichi_serve.frontend.internal import EXTRA_FIELDS, forbidden

# Deeper JSON makes recursive code downstream fail in its own ways (Python gives up at about 1,000).
MAX_DEPTH = 64


class Refusal(HTTPException):
    """A body that is not let in: 400, with the parameter that is wrong."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(400, message)
        self.parameter = parameter


def answer(_: Request, refusal: Refusal) -> JSONResponse:
    """The refusal in OpenAI's form."""
    return error(400, "invalid_request_error", refusal.detail, refusal.parameter)


def parse(body: bytes, **more: Any) -> Any:
    """A JSON body. Raises JSONDecodeError where it is none, and Refusal where it may not come in. `more` is
    for `json.loads`."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        raise Refusal(f"The body is not UTF-8: {wrong.reason} at byte {wrong.start}.") from None
    try:
        data = json.loads(text, **more)
    except RecursionError:
        raise _deep() from None
    except json.JSONDecodeError:
        raise
    except ValueError as wrong:  # a number of more digits than Python converts
        raise Refusal(f"The body is not acceptable: {wrong}.") from None
    # What has few brackets cannot be deep; counting them costs next to nothing.
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper(data, MAX_DEPTH):
        raise _deep()
    _check(data)
    return data


def strictly(body: bytes) -> Any:
    """A JSON body of our own routes. Raises Refusal, too, where a name is there twice, and for numbers that
    JSON does not have; what vLLM's routes are sent is as vLLM would take it."""
    return parse(body, object_pairs_hook=_once, parse_constant=_no_constant)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Refusal(f"{name[:80]!r} is there twice.", name[:80])
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise Refusal(f"{name} is no number in JSON.")


def _deep() -> Refusal:
    return Refusal(f"The body is nested more than {MAX_DEPTH} levels deep.")


def _deeper(data: Any, levels: int) -> bool:
    level: list[Any] = [data]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _check(data: Any) -> None:
    if (name := forbidden(data)) is not None:
        raise Refusal(f"{name} cannot be set by a client.", name)


def _form_as_object(form: Any) -> dict[str, Any]:
    """A form in the shape of a JSON body: vLLM takes extra arguments there as JSON in a string."""
    data: dict[str, Any] = dict(form)
    for name in EXTRA_FIELDS:
        if isinstance(data.get(name), str):
            with contextlib.suppress(ValueError, RecursionError):
                data[name] = json.loads(data[name])
    return data


@contextlib.contextmanager
def looked_at() -> Iterator[None]:
    """While this lasts, every route of every application of this process sees checked bodies only."""
    json_before, form_before = Request.json, Request._get_form

    async def checked_json(self: Request) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse(await self.body())
        return self._json

    async def checked_form(self: Request, **limits: Any) -> Any:
        form = await form_before(self, **limits)
        try:
            _check(_form_as_object(form))
        except Refusal:
            await form.close()  # its files
            raise
        return form

    Request.json, Request._get_form = checked_json, checked_form
    try:
        yield
    finally:
        Request.json, Request._get_form = json_before, form_before
