"""What became of each request of the demo, and the sums: from the client's times and the server's records."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from taichi_serve.bench.client import Answer
from taichi_serve.commands.workload import Planned
from taichi_serve.slo import SLO


@dataclass(frozen=True, slots=True)
class Hop:
    """One completed move."""

    move: str
    to: str
    gap: float  # seconds between the last token there and the first here
    kv_tokens: int  # that came over; the rest was computed again


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Times are seconds, as the client saw them."""

    number: int
    id: str
    kind: str
    prompt_tokens: int
    output_tokens: int
    prefilled: str
    decoded: tuple[str, ...]  # in the order it was there
    hops: tuple[Hop, ...]
    ttft: float | None
    tpot: float | None
    good: bool
    error: str | None


def row(planned: Planned, answer: Answer, record: dict[str, Any] | None, slo: SLO) -> Row:
    """Join what the client saw with the server's record of the request (GET /taichi/requests/{id})."""
    legs, log = (record["legs"], record["log"]) if record else ([], [])
    moves = {entry["leg"]: entry["move"] for entry in log if entry["type"] in ("Decode", "Flow")}
    prefilled = [leg["instance"] for leg in legs if leg["kind"] == "prefill"]
    hops = tuple(
        Hop(moves.get(leg["leg"], "?"), leg["instance"], leg["gap"], leg["kv_tokens"])
        for leg in legs
        if leg["kind"] == "decode"
    )
    # With a hand-over only the first token came from where it prefilled.
    stays = prefilled[-1:] if not (hops and hops[0].move == "hand-over") else []
    error = answer.error or (None if answer.ok else "it ended without a finish reason")
    if error is None and answer.output_tokens != planned.output:
        error = f"{answer.output_tokens} tokens came, {planned.output} were asked for"
    return Row(
        number=planned.number,
        id=answer.id,
        kind="chat" if planned.chat else "completion",
        prompt_tokens=answer.prompt_tokens,
        output_tokens=answer.output_tokens,
        prefilled=prefilled[-1] if prefilled else "-",
        decoded=(*stays, *(hop.to for hop in hops)),
        hops=hops,
        ttft=answer.ttft if answer.times else None,
        tpot=answer.tpot if answer.times else None,
        good=error is None and slo.good(answer.ttft, answer.tpot),
        error=error,
    )


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums of the table."""

    requests: int
    failed: int
    good: int
    prompt_tokens: int
    output_tokens: int
    prefilled: dict[str, int]  # requests by the instance they prefilled on
    moves: dict[str, int]  # completed moves by kind
    moved_bytes: int  # of KV, by the server's count
    median_gap: float | None  # seconds
    ttft: float | None  # median, seconds
    tpot: float | None


def totals(rows: list[Row], state: dict[str, Any]) -> Totals:
    """Sum the rows; the bytes of KV come from the server's state (GET /taichi/state)."""
    hops = [hop for row in rows for hop in row.hops]
    done = [row for row in rows if row.error is None]
    return Totals(
        requests=len(rows),
        failed=len(rows) - len(done),
        good=sum(row.good for row in rows),
        prompt_tokens=sum(row.prompt_tokens for row in rows),
        output_tokens=sum(row.output_tokens for row in rows),
        prefilled=dict(sorted(Counter(row.prefilled for row in done).items())),
        moves=dict(Counter(hop.move for hop in hops)),
        moved_bytes=state["moves"]["bytes"],
        median_gap=_median([hop.gap for hop in hops]),
        ttft=_median([row.ttft for row in done if row.ttft is not None]),
        tpot=_median([row.tpot for row in done if row.tpot is not None]),
    )


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
