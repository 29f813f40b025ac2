"""Request traces from files, in four public formats told apart by how the file begins.

    {"timestamp": ..., "hash_ids": [...]}                       JSON lines (Mooncake): mooncake.py
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
from typing import TextIO

from taichi_serve.bench import mooncake
from taichi_serve.bench.trace import MOST_TOKENS, Reading, Trace, TraceError

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
FRACTION = re.compile(r"\.(\d+)", re.ASCII)
BEGINNING = 4096  # characters in which a file shows what it is


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
    (`over_limit` "refuse"), left out ("skip"), or made to fit ("cut"): the end of the prompt gives way to the
    output, and the prompt keeps at least one token.
    """
    trace = Trace(path.stem, array("q"), array("q"), array("d"), limit)
    first = 2
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = file.read(BEGINNING).lstrip().startswith("{")
            file.seek(0)
            if lines:
                first = 1
                mooncake.read(path, file, trace, scale, over_limit)
            else:
                _read_csv(path, file, _Rows(trace, scale, over_limit))
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    if not trace.rows:
        raise TraceError(f"{path}: row {first}: the trace has no requests")
    if not len(trace):
        raise TraceError(f"{path}: row {first}: every row is over the model's limit of {limit} tokens")
    return trace


def _read_csv(path: Path, file: TextIO, reading: _Rows) -> None:
    number = 1
    try:
        rows = csv.reader(file, strict=True)
        header = [name.strip() for name in next(rows, [])]
        columns = _format(path, header)
        for number, row in enumerate(rows, start=2):
            if row:
                reading.take(f"{path}: row {number}", header, row, columns)
    except csv.Error as error:
        raise TraceError(f"{path}: row {number + 1}: no CSV: {error}") from error


def _format(path: Path, names: Sequence[str]) -> Columns:
    for columns in FORMATS:
        if {columns.prompt, columns.output, columns.time or columns.prompt} <= set(names):
            return columns
    wanted = (
        "TIMESTAMP, ContextTokens, GeneratedTokens or [arrived_at,] num_prefill_tokens, num_decode_tokens"
    )
    found = ", ".join(" ".join(name.split()) for name in names) or "(none)"
    raise TraceError(f"{path}: row 1: columns {found[:200]}; expected {wanted}")


class _Rows(Reading):
    """The rows of a CSV, one by one."""

    zoned: bool | None = None  # whether the times have an offset

    def take(self, where: str, header: Sequence[str], row: Sequence[str], columns: Columns) -> None:
        """Add one row, unless it is over the limit and to be skipped."""
        if len(row) > len(header):
            raise TraceError(f"{where}: {len(row)} fields under a header of {len(header)}")
        fields = dict(zip(header, row, strict=False))
        prompt, output = (
            self._tokens(where, field, fields.get(field)) for field in (columns.prompt, columns.output)
        )
        at = None if columns.time is None else self._time(where, columns.time, fields.get(columns.time))
        if (fitting := self.fit(where, columns.prompt, prompt, output)) is not None:
            self.keep(*fitting, at)

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
        return self.later(where, field, at, text)

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
