"""Errors in the form of the OpenAI API, wherever they are found. On Anthropic's routes the door rewords them
(anthropic_form.py)."""

from __future__ import annotations

from starlette.responses import JSONResponse

RETRY_AFTER = 1  # seconds; what is busy now is so for moments
SHUTTING_DOWN = "The server is shutting down."


def error(
    status: int, kind: str, message: str, parameter: str | None = None, retry_after: int | None = None
) -> JSONResponse:
    """An error in the form of the OpenAI API; `retry_after` (seconds) becomes the header of that name."""
    body = {"error": {"message": message, "type": kind, "param": parameter, "code": status}}
    headers = None if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse(body, status_code=status, headers=headers)


def unread(
    status: int, kind: str, message: str, parameter: str | None = None, retry_after: int | None = None
) -> JSONResponse:
    """An error that is answered although the body has not been read: the connection ends with it."""
    answer = error(status, kind, message, parameter, retry_after)
    # Otherwise the client could go on sending what nobody will read.
    answer.headers["Connection"] = "close"
    return answer
