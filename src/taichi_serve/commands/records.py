"""Where the record of a request comes from: a running server, or the event log of one. Both give the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from taichi_serve import eventlog
from taichi_serve.frontend.names import find
from taichi_serve.frontend.record import History, parts, view
from taichi_serve.messages import Tuned

Record = dict[str, Any]


class NoAnswerError(Exception):
    """The server cannot be asked, or says no; the message is one line."""


def asked(url: str, name: str, key: str | None) -> list[Record]:
    """What a server remembers of the request; ValueError where it knows no such request."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        route = f"{url.rstrip('/')}/taichi/requests/{quote(name, safe='')}"
        answer = httpx.get(route, headers=headers, timeout=10.0)
        content = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as wrong:
        raise NoAnswerError(f"no answer from {url}: {wrong}") from wrong
    if answer.status_code == 200:
        return list(content["requests"])
    wrong_id = answer.status_code == 404
    raise (ValueError if wrong_id else NoAnswerError)(_message(content, answer.status_code))


def _message(content: Any, status: int) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    return str(error["message"]) if isinstance(error, dict) and "message" in error else f"HTTP {status}"


def logged(path: Path, name: str) -> list[Record]:
    """The same out of an event log; ValueError where it has no such request or is none."""
    histories: dict[str, History] = {}
    tuned: list[Tuned] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for event, commands in eventlog.read(lines, name, Tuned.__name__):
                if isinstance(event, Tuned):
                    tuned.append(event)
                for request, part in parts(event, commands):
                    histories.setdefault(request, []).append(part)
    except (eventlog.LogError, UnicodeDecodeError) as wrong:
        raise ValueError(f"{path} is not an event log: {wrong}") from wrong
    found = find(name, histories)
    if not found:
        raise ValueError(f"no request {name!r} in {path}")
    return [view(request, histories[request], tuned) for request in found]
