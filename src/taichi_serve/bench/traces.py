"""Request traces from CSV files, in three public formats told apart by their header.

    num_prefill_tokens, num_decode_tokens[, ...]                lengths only (vidur's processed traces)
    arrived_at, num_prefill_tokens, num_decode_tokens[, ...]    seconds from the start (LLMServingSim)
    TIMESTAMP, ContextTokens, GeneratedTokens                   date and time (Azure's public traces)

Reading is strict: every error is one line with file, row (the header is row 1) and field.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


class TraceError(ValueError):
    """A trace that cannot be used; the message names file, row and field."""


@dataclass(frozen=True)
class Trace:
    """Lengths in tokens, and arrival times in seconds from the first (empty where the file has none)."""

    name: str
    prompts: array[int]
    outputs: array[int]
    times: array[float]

    def __len__(self) -> int:
        return len(self.prompts)

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


def read_trace(path: Path, limit: int | None = None, scale: float = 1.0) -> Trace:
    """Read a trace, all lengths times `scale`; `limit` is the most tokens that prompt and output together
    may have then."""
    trace = Trace(path.stem, array("q"), array("q"), array("d"))
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = _format(path, reader.fieldnames or [])
            for number, row in enumerate(reader, start=2):
                _take(trace, f"{path}: row {number}", row, columns, limit, scale)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    if not len(trace):
        raise TraceError(f"{path}: row 2: the trace has no requests")
    return trace


def _format(path: Path, header: object) -> Columns:
    names = list(header) if isinstance(header, (list, tuple)) else []
    for columns in FORMATS:
        if {columns.prompt, columns.output, columns.time or columns.prompt} <= set(names):
            return columns
    wanted = (
        "TIMESTAMP, ContextTokens, GeneratedTokens or [arrived_at,] num_prefill_tokens, num_decode_tokens"
    )
    raise TraceError(f"{path}: row 1: columns {', '.join(names) or '(none)'}; expected {wanted}")


def _take(
    trace: Trace,
    where: str,
    row: Mapping[str, str | None],
    columns: Columns,
    limit: int | None,
    scale: float,
) -> None:
    prompt, output = (
        max(1, round(_tokens(where, field, row[field]) * scale)) for field in (columns.prompt, columns.output)
    )
    if limit is not None and prompt + output > limit:
        raise TraceError(
            f"{where}: {columns.prompt}: {prompt} + {output} tokens are over the model's limit of {limit}"
        )
    if columns.time is not None:
        at = _seconds(where, columns.time, row[columns.time])
        if trace.times and at < trace.times[-1]:
            raise TraceError(f"{where}: {columns.time}: {row[columns.time]} is earlier than the row before")
        trace.times.append(at)
    trace.prompts.append(prompt)
    trace.outputs.append(output)


def _tokens(where: str, field: str, text: str | None) -> int:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (value >= 1 and value == int(value)):
        raise TraceError(f"{where}: {field}: expected a whole number of at least 1, not {text!r}")
    return int(value)


def _seconds(where: str, field: str, text: str | None) -> float:
    if field == "TIMESTAMP":
        try:
            # Seven digits after the point: Python reads six.
            head, _, fraction = (text or "").strip().partition(".")
            moment = datetime.fromisoformat(head)
            return moment.timestamp() + float(f"0.{fraction or 0}")
        except ValueError as error:
            raise TraceError(f"{where}: {field}: expected a date and time, not {text!r}") from error
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise TraceError(f"{where}: {field}: expected seconds of at least 0, not {text!r}")
    return value


def cycle(trace: Trace) -> Iterator[tuple[int, int]]:
    """The lengths of the trace in order, over and over."""
    while True:
        yield from zip(trace.prompts, trace.outputs, strict=True)
