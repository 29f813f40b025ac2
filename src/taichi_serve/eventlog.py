"""The event log: every fact with the decisions that followed, one JSON line each, appended as they happen.

Metrics, dashboards, replays and explanations read it. A line is `{"on": ["Stepped", {...}], "do": [["Flow",
{...}], ...]}`; fields that have their default value are left out. The type names and fields are those of
messages.py, so a log is read back strictly: a line that does not fit is an error with its number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from typing import IO, Any, get_args

import msgspec

from taichi_serve.cluster.base import Scheduler
from taichi_serve.messages import Command, Event, Timeline

Entry = tuple[Event, tuple[Command, ...]]

EVENTS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}
COMMANDS: dict[str, type[Command]] = {kind.__name__: kind for kind in get_args(Command)}
NO_TIMELINE = {field.name: 0.0 for field in fields(Timeline) if field.default is MISSING}


class LogError(ValueError):
    """A line of a log that does not fit; the message says which and why."""


def encode(event: Event, commands: Iterable[Command]) -> str:
    """One line, without its newline."""
    line = {"on": _named(event), "do": [_named(c) for c in commands]}
    return msgspec.json.encode(line).decode()


def decode(line: str) -> Entry:
    """A line back into what was encoded; raises LogError."""
    try:
        raw = msgspec.json.decode(line, type=dict[str, Any])
        event: Event = _typed(raw["on"], EVENTS)
        commands: tuple[Command, ...] = tuple(_typed(c, COMMANDS) for c in raw["do"])
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise LogError(f"{type(error).__name__}: {error}") from error
    return event, commands


def read(lines: Iterable[str], about: str = "") -> Iterator[Entry]:
    """Every line of a log; a torn last one (the writer was killed) ends it, another bad one is an error.

    With `about` only the lines that have this text in them are looked at: a day's log is long.
    """
    text = msgspec.json.encode(about).decode()[1:-1]
    pending: LogError | None = None
    for number, line in enumerate(lines, start=1):
        if text not in line:
            continue
        if pending is not None:
            raise pending
        try:
            yield decode(line)
        except LogError as error:
            pending = LogError(f"line {number}: {error}")
            if line.endswith("\n"):
                raise pending from error


class Logged:
    """A scheduler that writes down every fact and what it decided; it is driven like the one inside."""

    def __init__(self, scheduler: Scheduler, out: IO[str]) -> None:
        """`out` is appended to and not flushed: that is for whoever opened it."""
        self.scheduler = scheduler
        self.out = out

    def on(self, event: Event) -> Sequence[Command]:
        """Decide, and write it down."""
        commands = self.scheduler.on(event)
        self.out.write(encode(event, commands) + "\n")
        return commands


def replay(scheduler: Scheduler, entries: Iterable[Entry]) -> Iterator[tuple[int, Entry, list[Command]]]:
    """Feed the facts of a log to a scheduler; gives every entry where it decides otherwise, numbered."""
    for number, (event, commands) in enumerate(entries, start=1):
        decided = list(scheduler.on(event))
        if decided != list(commands):
            yield number, (event, commands), decided


def _named(message: Event | Command) -> list[Any]:
    values = {
        field.name: getattr(message, field.name)
        for field in fields(message)
        if field.default is MISSING or getattr(message, field.name) != field.default
    }
    return [type(message).__name__, msgspec.to_builtins(values)]


def _typed(raw: Any, kinds: dict[str, Any]) -> Any:
    name, values = raw
    kind = kinds[name]
    if unknown := set(values) - {field.name for field in fields(kind)}:
        raise ValueError(f"{name} has no field {min(unknown)!r}")
    if timeline := values.get("timeline"):  # an older log knows fewer parts of a move
        values = {**values, "timeline": {**NO_TIMELINE, **timeline}}
    return msgspec.convert(values, kind)
