"""All instances at once: the numbers that predictions and choices depend on, one array for each quantity.

A decision among many instances first looks at these, and then asks about the few that can win. An answer for
all rows at once is a predictor's own answer up to rounding (see `SURE`), and costs as much as three single
ones do.
"""

from __future__ import annotations

from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt

from taichi_serve.instance import Instance
from taichi_serve.sliders import Kind

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# Numbers that differ by less than this share of them, or by so many seconds, may be the same: sums of a few
# dozen terms in another order are wrong by a millionth of it at most.
SURE = 1e-9

QUANTITIES = 16
LOOKS = 5  # numbers that a predictor keeps of each instance


def margin(seconds: float) -> float:
    """How far from this an answer for all rows may be that is exactly this."""
    return SURE * (1.0 + abs(seconds))


class Columns:
    """One array for each quantity of an instance, all of them with a row for each instance. Counts are whole
    numbers far below 2^53, so that sums of them are exact."""

    def __init__(self, rows: int) -> None:
        self.numbers: Floats = np.zeros((QUANTITIES, rows))
        self.looks: Floats = np.zeros((LOOKS, rows))
        self.d_heavy: Floats  # 1 or 0, as are `open` and `answers`
        self.chunk: Floats  # prompt tokens a step, at least 1
        self.ahead: Floats  # prompt tokens queued and not yet computed
        self.running: Floats  # of these, in the step that runs
        self.attended: Floats  # attended tokens per queued prompt token
        self.decodes: Floats
        self.context: Floats  # tokens that the decodes attend to; predictions depend on no column after it
        self.prompts: Floats  # requests queued
        self.used: Floats  # KV tokens in use, promised, or about to be
        self.kv_tokens: Floats  # KV tokens in use
        self.capacity: Floats  # KV tokens in all
        self.open: Floats  # whether it has a seat for one more
        self.answers: Floats
        self.lends_until: Floats  # seconds
        self.stepped_at: Floats  # seconds
        self.last_by: Floats  # the latest deadline queued there (seconds), minus infinity for none
        (
            self.d_heavy, self.chunk, self.ahead, self.running, self.attended, self.decodes, self.context,
            self.prompts, self.used, self.kv_tokens, self.capacity, self.open, self.answers,
            self.lends_until, self.stepped_at, self.last_by,
        ) = self.numbers  # fmt: skip
        self.low: Mask = np.zeros(rows, np.bool_)  # D-heavy

    def put(self, rows: list[int], numbers: list[tuple[float, ...]], looks: list[tuple[float, ...]]) -> None:
        """These instances are as `numbers` (see `row`) and `looks` (of the predictor) say from now on."""
        for table, found in ((self.numbers, numbers), (self.looks, looks)):
            flat = np.fromiter(chain.from_iterable(found), np.float64, len(rows) * len(table))
            table[:, rows] = flat.reshape(len(rows), len(table)).T
        self.low = self.d_heavy > 0.0


def row(instance: Instance, last_by: float) -> tuple[float, ...]:
    """The numbers of one instance, in the order of the columns."""
    ahead, queued, decodes = instance.queued_prefill_tokens, instance.queued_tokens, instance.decodes
    return (
        instance.kind is Kind.D_HEAVY,
        instance.chunk or 1,
        ahead,
        instance.running_tokens,
        instance.queued_attention / queued if queued else 0.0,
        decodes,
        instance.context_base + decodes * instance.ticks,
        instance.queued_requests,
        instance.kv_tokens + instance.reserved_tokens + ahead + instance.queued_unused,
        instance.kv_tokens,
        instance.kv_capacity,
        instance.seats_left > 0,
        instance.alive and not instance.silent,
        instance.lends_until,
        instance.stepped_at,
        last_by,
    )


class Wide(Protocol):
    """A predictor that answers for all instances at once; predict.py says what each question means. Arrays
    have one number a row, in seconds; `cached` and `kv_tokens` are one number for all rows, or an array."""

    def look(self, instance: Instance) -> tuple[float, ...]:
        """`LOOKS` numbers: what it has learned of an instance by now."""
        ...

    def alike(self, columns: Columns, rows: npt.NDArray[np.intp]) -> Floats:
        """Of these rows the numbers, beside those of the instances, that all answers depend on now."""
        ...

    def ttfts(self, columns: Columns, prompt_tokens: int, cached: Floats | int) -> Floats:
        """The same as `ttft` of each."""
        ...

    def works(self, columns: Columns, prompt_tokens: int) -> Floats:
        """The same as `work` of each, with nothing cached."""
        ...

    def sinces(self, columns: Columns, now: float) -> Floats:
        """The same as `since` of each."""
        ...

    def tpots(self, columns: Columns, kv_tokens: int) -> Floats:
        """The same as `tpot` of each."""
        ...

    def fetches(self, columns: Columns, lender: Instance, kv_tokens: Floats | int) -> Floats:
        """The same as `fetch` from `lender` to each."""
        ...
