"""Errors in the form of the OpenAI API, wherever they are found. On Anthropic's routes the door rewords them
(anthropic_form.py)."""

from __future__ import annotations

from starlette.responses import JSONResponse

LONGEST = 2000  # characters of a message
RETRY_AFTER = 1  # seconds; what is busy now is so for moments
SHUTTING_DOWN = "The server is shutting down."


def error(
    status: int, kind: str, message: str, parameter: str | None = None, retry_after: int | None = None
) -> JSONResponse:
    """An error in the form of the OpenAI API; `retry_after` (seconds) becomes the header of that name."""
    named = None if parameter is None else _sayable(parameter, 200)
    body = {"error": {"message": _sayable(message, LONGEST), "type": kind, "param": named, "code": status}}
    headers = None if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse(body, status_code=status, headers=headers)


def _sayable(text: str, most: int) -> str:
    """What a client said may be as long as a body, and have halves of characters: no answer can."""
    short = text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
    return short.encode("utf-8", "replace").decode()


def unread(
    status: int, kind: str, message: str, parameter: str | None = None, retry_after: int | None = None
) -> JSONResponse:
    """An error that is answered although the body has not been read: the connection ends with it."""
    answer = error(status, kind, message, parameter, retry_after)
    # Otherwise the client could go on sending what nobody will read.
    answer.headers["Connection"] = "close"
    return answer
