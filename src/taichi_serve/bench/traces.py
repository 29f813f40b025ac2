"""Request traces from CSV files, in three public formats told apart by their header.

    num_prefill_tokens, num_decode_tokens[, ...]                lengths only (vidur's processed traces)
    arrived_at, num_prefill_tokens, num_decode_tokens[, ...]    seconds from the start (LLMServingSim)
    TIMESTAMP, ContextTokens, GeneratedTokens                   date and time (Azure's public traces)

Reading is strict: every error is one line with file, row (the header is row 1) and field. A time without an
offset from UTC counts as UTC, never as the local time of whoever reads: an hour would be lost or doubled
where clocks change.
"""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

OVER_LIMIT = ("refuse", "skip", "cut")
MOST_TOKENS = 1_000_000_000  # of one length in a file: beyond any model, and far inside a machine word
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
FRACTION = re.compile(r"\.(\d+)", re.ASCII)


class TraceError(ValueError):
    """A trace that cannot be used; the message names file, row and field."""


@dataclass
class Trace:
    """Lengths in tokens, and arrival times in seconds (empty where the file has none); `over` is how many
    rows were over the model's `limit` and were skipped or cut, of the `rows` that the file has."""

    name: str
    prompts: array[int]
    outputs: array[int]
    times: array[float]
    limit: int | None = None
    over: int = 0
    rows: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def note(self, over_limit: str) -> str:
        """What became of rows over the limit, in words; empty where there were none."""
        if not self.over:
            return ""
        done = {"skip": "skipped", "cut": "cut"}[over_limit]
        return (
            f"{self.name}: {self.over} of {self.rows} rows are over the model's limit of {self.limit} tokens "
            f"and were {done}"
        )

    @property
    def rate(self) -> float:
        """Requests/s of the trace's own arrivals; 0.0 where it has none."""
        span = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        return (len(self.times) - 1) / span if span > 0 else 0.0


@dataclass(frozen=True)
class Columns:
    """Where a format keeps what."""

    prompt: str
    output: str
    time: str | None


FORMATS = (
    Columns("ContextTokens", "GeneratedTokens", "TIMESTAMP"),
    Columns("num_prefill_tokens", "num_decode_tokens", "arrived_at"),
    Columns("num_prefill_tokens", "num_decode_tokens", None),
)


def read_trace(path: Path, limit: int | None = None, scale: float = 1.0, over_limit: str = "refuse") -> Trace:
    """Read a trace, all lengths times `scale`; TraceError is one line that names file, row and field.

    `limit` is the most tokens that prompt and output together may have then. Rows above it are an error
    (`over_limit` "refuse"), left out ("skip"), or made to fit ("cut"): the prompt gives way to the output,
    and keeps at least one token.
    """
    if over_limit not in OVER_LIMIT:
        raise ValueError(f"over-limit {over_limit!r} is none of {', '.join(OVER_LIMIT)}")
    reading = _Reading(Trace(path.stem, array("q"), array("q"), array("d"), limit), scale, over_limit)
    number = 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)
            header = [name.strip() for name in next(rows, [])]
            columns = _format(path, header)
            for number, row in enumerate(rows, start=2):
                if row:
                    reading.take(f"{path}: row {number}", header, row, columns)
    except csv.Error as error:
        raise TraceError(f"{path}: row {number + 1}: no CSV: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    trace = reading.trace
    if not trace.rows:
        raise TraceError(f"{path}: row 2: the trace has no requests")
    if not len(trace):
        raise TraceError(f"{path}: row 2: every row is over the model's limit of {limit} tokens")
    return trace


def _format(path: Path, names: Sequence[str]) -> Columns:
    for columns in FORMATS:
        if {columns.prompt, columns.output, columns.time or columns.prompt} <= set(names):
            return columns
    wanted = (
        "TIMESTAMP, ContextTokens, GeneratedTokens or [arrived_at,] num_prefill_tokens, num_decode_tokens"
    )
    found = ", ".join(" ".join(name.split()) for name in names) or "(none)"
    raise TraceError(f"{path}: row 1: columns {found[:200]}; expected {wanted}")


class _Reading:
    """A trace under way, row by row."""

    def __init__(self, trace: Trace, scale: float, over_limit: str) -> None:
        self.trace, self.scale, self.over_limit = trace, scale, over_limit
        self.at = -math.inf  # when the row before arrived
        self.zoned: bool | None = None  # whether the times have an offset

    def take(self, where: str, header: Sequence[str], row: Sequence[str], columns: Columns) -> None:
        """Add one row, unless it is over the limit and to be skipped."""
        if len(row) > len(header):
            raise TraceError(f"{where}: {len(row)} fields under a header of {len(header)}")
        fields = dict(zip(header, row, strict=False))
        prompt, output = (
            self._tokens(where, field, fields.get(field)) for field in (columns.prompt, columns.output)
        )
        at = None if columns.time is None else self._time(where, columns.time, fields.get(columns.time))
        trace, limit = self.trace, self.trace.limit
        trace.rows += 1
        if limit is not None and prompt + output > limit:
            trace.over += 1
            if self.over_limit == "refuse":
                raise TraceError(
                    f"{where}: {columns.prompt}: {prompt} + {output} tokens are over the model's limit of "
                    f"{limit} (--over-limit skip or cut takes such a trace)"
                )
            if self.over_limit == "skip":
                return
            output = max(1, min(output, limit - 1))
            prompt = max(1, limit - output)
        trace.prompts.append(prompt)
        trace.outputs.append(output)
        if at is not None:
            trace.times.append(at)

    def _tokens(self, where: str, field: str, text: str | None) -> int:
        value = _number(text)
        if not (1 <= value <= MOST_TOKENS and value == int(value)):
            most = f" and at most {MOST_TOKENS}" if value > MOST_TOKENS else ""
            raise TraceError(
                f"{where}: {field}: expected a whole number of at least 1{most}, not {_short(text)}"
            )
        scaled = value * self.scale
        if scaled > MOST_TOKENS:
            raise TraceError(f"{where}: {field}: {text} times {self.scale:g} is above {MOST_TOKENS} tokens")
        return max(1, round(scaled))

    def _time(self, where: str, field: str, text: str | None) -> float:
        at = self._moment(where, field, text) if field == "TIMESTAMP" else _seconds(where, field, text)
        if at < self.at:
            raise TraceError(f"{where}: {field}: {text} is earlier than the row before")
        self.at = at
        return at

    def _moment(self, where: str, field: str, text: str | None) -> float:
        """Seconds since 1970 of a date and time, with an offset from UTC or without one in all rows."""
        word = (text or "").strip()
        try:
            if not word.isascii():
                raise ValueError("digits of another script")
            # Seven digits after the point: Python reads six.
            moment = datetime.fromisoformat(FRACTION.sub("", word))
            zoned = moment.tzinfo is not None
            at = (moment if zoned else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError) as error:
            raise TraceError(f"{where}: {field}: expected a date and time, not {_short(text)}") from error
        if self.zoned not in (None, zoned):
            raise TraceError(
                f"{where}: {field}: {word} has {'an' if zoned else 'no'} offset from UTC, unlike those before"
            )
        self.zoned = zoned
        fraction = FRACTION.search(word)
        return at + (float(fraction.group()) if fraction else 0.0)


def _seconds(where: str, field: str, text: str | None) -> float:
    value = _number(text)
    if not (math.isfinite(value) and value >= 0):
        raise TraceError(f"{where}: {field}: expected seconds of at least 0, not {_short(text)}")
    return value


def _number(text: str | None) -> float:
    """A plain decimal number, NaN for anything else: float() alone takes 1_000, Infinity and digits of any
    script."""
    word = (text or "").strip()
    return float(word) if NUMBER.fullmatch(word) else math.nan


def _short(text: str | None) -> str:
    return repr(text) if text is None or len(text) <= 60 else f"{text[:60]!r}..."
