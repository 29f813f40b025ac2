"""The event log: every fact with the decisions that followed, one JSON line each, appended as they happen.

Metrics, dashboards, replays and explanations read it. A line is `{"on": ["Stepped", {...}], "do": [["Flow",
{...}], ...]}`; fields that have their default value are left out. The type names and fields are those of
messages.py, so a log is read back strictly: a line that does not fit is an error with its number.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
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


def read(lines: Iterable[str], *about: str) -> Iterator[Entry]:
    """Every line of a log; a torn last one (the writer was killed) ends it, another bad one is an error.

    With `about` only the lines that have one of these texts in them are looked at: a day's log is long.
    """
    texts = [msgspec.json.encode(text).decode()[1:-1] for text in about]
    pending: LogError | None = None
    for number, line in enumerate(lines, start=1):
        if texts and not any(text in line for text in texts):
            continue
        if pending is not None:
            raise pending
        try:
            yield decode(line)
        except LogError as error:
            pending = LogError(f"line {number}: {error}")
            if line.endswith("\n"):
                raise pending from error


class EventLog:
    """A log on disk, appended to; what cannot be written is lost, and what is written stays readable.

    A full disk takes half a line and an error: the half is cut off again, so that the log has no torn line in
    its middle when there is room once more.
    """

    AT_ONCE = 1 << 13  # bytes that are gathered before they are written

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file cannot be opened."""
        self._file = path.open("ab", buffering=0)
        self._gathered = bytearray()

    def write(self, event: Event, commands: Iterable[Command]) -> None:
        """Add an entry; raises OSError where it, and what was gathered before it, is lost."""
        self._gathered += encode(event, commands).encode() + b"\n"
        if len(self._gathered) >= self.AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered; raises OSError where that is lost."""
        text, self._gathered = bytes(self._gathered), bytearray()
        before, written = self._size(), 0
        try:
            while written < len(text):
                written += self._file.write(text[written:])
        except OSError:
            if written and self._size() == before + written:  # nobody else has appended to it since
                self._file.truncate(before)
            raise

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Write the rest; raises OSError where that is lost, and is closed all the same."""
        try:
            self.flush()
        finally:
            self._file.close()


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
