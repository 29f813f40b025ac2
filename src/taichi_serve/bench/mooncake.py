"""Traces in Mooncake's format: one JSON object a line, and a request in each.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}

`timestamp` is in milliseconds; `hash_ids` names every block of 512 tokens of the prompt, the last one too
that may not be full. Equal ids at equal places mean equal tokens. Only full blocks count here, as only these
are kept by a prefix cache.

The file does not say what an answer is. Where a later prompt goes on behind all full blocks of this one, is
long enough to hold the answer as well, and every later prompt that goes on there goes on alike, it is the
next turn: its blocks behind the prompt are those of the answer. In all other cases nobody else has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from taichi_serve.bench.blocks import chained
from taichi_serve.bench.trace import MOST_TOKENS, Reading, Trace, TraceError

BLOCK = 512  # tokens of a hash id
SMALLEST = 16  # tokens of a block when all lengths are scaled: fewer than engines have in one
MOST_MILLISECONDS = 1e15  # 30,000 years
MOST_ID = 1 << 63  # file's ids are below, those made here are not


def read(path: Path, file: TextIO, trace: Trace, scale: float, over_limit: str) -> None:
    """Fill `trace` from the lines of a file; TraceError is one line with file, row and field.

    A `scale` other than 1 scales the blocks with the lengths, so they must come out whole.
    """
    block = BLOCK * scale
    if block != int(block) or block < SMALLEST:
        raise TraceError(
            f"{path}: row 1: hash_ids: a block of {BLOCK} tokens times {scale:g} is no whole number of at "
            f"least {SMALLEST}: take a scale such as 0.25 or 0.5"
        )
    trace.block_size = int(block)
    reading = _Lines(trace, scale, over_limit)
    for number, line in enumerate(file, start=1):
        if line.strip():
            reading.take(f"{path}: row {number}", line)
    reading.answers()


class _Lines(Reading):
    """The lines of a file, one by one."""

    def __init__(self, trace: Trace, scale: float, over_limit: str) -> None:
        super().__init__(trace, scale, over_limit)
        self.cut: set[int] = set()  # kept rows without the end of their prompt: nothing goes on behind them

    def take(self, where: str, line: str) -> None:
        """Add one request, unless it is over the limit and to be skipped."""
        row = _object(where, line)
        length, output = (_tokens(where, field, row) for field in ("input_length", "output_length"))
        ids = _ids(where, row, length)
        at = self.later(where, "timestamp", _milliseconds(where, row) / 1e3, row["timestamp"])
        prompt, answer = (max(1, math.floor(tokens * self.scale)) for tokens in (length, output))
        fitting = self.fit(where, "input_length", prompt, answer)
        if fitting is None:
            return
        if fitting != (prompt, answer):
            self.cut.add(len(self.trace))
        full = fitting[0] // self.trace.block_size
        self.trace.blocks.append(tuple(chained(ids[:full])))
        self.keep(*fitting, at)

    def answers(self) -> None:
        """Add the blocks behind the prompts, from the last row to the first."""
        trace = self.trace
        after: dict[int, dict[int, int]] = {}  # block -> later blocks behind it -> the longest such prompt
        for row in range(len(trace) - 1, -1, -1):
            prompt = trace.blocks[row]
            total = trace.prompts[row] + trace.outputs[row]
            missing = total // trace.block_size - len(prompt)
            if missing:
                found = None if row in self.cut else _behind(after, prompt, missing, total)
                made = chained(range(MOST_ID + row, MOST_ID + row + 1), prompt[-1] if prompt else 0)
                if found is None:
                    found = made + chained([0] * (missing - 1), made[-1])
                trace.blocks[row] = (*prompt, *found)
            for block, following in pairwise(prompt):
                longest = after.setdefault(block, {})
                longest[following] = max(longest.get(following, 0), trace.prompts[row])


def _behind(
    after: Mapping[int, Mapping[int, int]], prompt: tuple[int, ...], count: int, total: int
) -> list[int] | None:
    """The `count` blocks with which all later prompts go on behind `prompt`, one of which has at least
    `total` tokens; None where there is no such prompt, or they differ."""
    if not prompt:
        return None
    found: list[int] = []
    block = prompt[-1]
    for _ in range(count):
        ways = after.get(block, {})
        if len(ways) != 1:
            return None
        ((block, longest),) = ways.items()
        if longest < total:
            return None
        found.append(block)
    return found


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", "") or "beyond what a reader takes"
        raise TraceError(f"{where}: no JSON: {why}") from None
    if not isinstance(row, dict):
        raise TraceError(f"{where}: expected an object with timestamp, input_length, output_length, hash_ids")
    return row


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tokens(where: str, field: str, row: Mapping[str, Any]) -> int:
    value = row.get(field)
    if not (_whole(value) and 1 <= value <= MOST_TOKENS):  # type: ignore[operator]  # it is a whole number
        raise TraceError(
            f"{where}: {field}: expected a whole number of at least 1 and at most {MOST_TOKENS}, not "
            f"{_short(row, field)}"
        )
    assert isinstance(value, int)
    return value


def _milliseconds(where: str, row: Mapping[str, Any]) -> float:
    value = row.get("timestamp")
    number = isinstance(value, float) or _whole(value)
    if not (number and 0 <= value <= MOST_MILLISECONDS):  # type: ignore[operator]  # it is a number
        raise TraceError(
            f"{where}: timestamp: expected milliseconds of at least 0 and at most {MOST_MILLISECONDS:g}, not "
            f"{_short(row, 'timestamp')}"
        )
    assert isinstance(value, int | float)
    return float(value)


def _ids(where: str, row: Mapping[str, Any], length: int) -> list[int]:
    """The ids of a prompt of `length` tokens."""
    ids = row.get("hash_ids")
    if not isinstance(ids, list):
        raise TraceError(
            f"{where}: hash_ids: expected a list of whole numbers, not {_short(row, 'hash_ids')}"
        )
    wanted = -(-length // BLOCK)
    if len(ids) != wanted:
        raise TraceError(
            f"{where}: hash_ids: {len(ids)} ids for {length} tokens, expected {wanted}: one for every {BLOCK}"
        )
    for name in ids:
        if not (_whole(name) and 0 <= name < MOST_ID):
            raise TraceError(
                f"{where}: hash_ids: expected whole numbers of at least 0 and below 2^63, not "
                f"{_short({'id': name}, 'id')}"
            )
    return ids


def _short(row: Mapping[str, Any], field: str) -> str:
    """What the field has, as JSON."""
    if field not in row:
        return "nothing"
    value = row[field]
    if _whole(value) and abs(value) > MOST_ID:  # Python refuses to write some of these
        return "a number beyond 2^63"
    word = json.dumps(value)
    return word if len(word) <= 60 else f"{word[:60]}..."
