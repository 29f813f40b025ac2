"""What knowing prefix caches is worth with every family tuned: goodput, and prompt tokens not computed.

    scripts/compile.sh
    PYTHONPATH=build/compiled python scripts/prefix.py TRACE --out cells.jsonl [--processes 16] [--minutes 9]

TRACE is a file in Mooncake's format, played with its own arrivals, faster or slower. Eight instances of
Qwen2.5-14B; KV on the GPU only and with a tier in host memory; the scheduler blind, with prefixes in its
predictions, and with fetches. Aggregation, disaggregation and hybrid are tuned for each of these on runs that
begin at rows drawn from the trace, and judged on all of the trace from its first row, by TTFT alone and by
both SLOs. Beside them stand eight instances alike whose answers have one token: what a reckoning of prefills
alone would promise, and the table of others that simulate no decodes is to be compared with.

Every cell is independent, and a line of --out each as soon as it is tuned, and when it is judged. What is in
the file is not done again, so an interrupted run goes on where it was. When nothing is left, or the minutes
are over, the tables of what is there are printed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import Pool
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any, NamedTuple

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.lengths import InOrder
from taichi_serve.bench.workload import Workload, workload
from taichi_serve.latency.shipped import machine
from taichi_serve.scheduling.policy import PREFIXES, Policy
from taichi_serve.search.climb import climb
from taichi_serve.search.crew import workers
from taichi_serve.search.effort import Effort, Plan
from taichi_serve.search.families import aggregation, disaggregation, end_of, hybrid
from taichi_serve.search.goodput import Contender, Scene
from taichi_serve.search.sliders import Hunt
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

LIMIT = 131_072  # tokens of prompt and output: the model with its context extended, as the trace needs it
INSTANCES, LONGEST = 8, 8192
# Seconds where goodput is by TTFT alone. Without any limit prompts would be in time on two decoders that are
# behind by an hour, and whether they stay in time would be chance.
ANY_TPOT = 0.5
TUNING = (1, 2)  # seeds: each begins at a row that it draws
ALIKE = Contender("alike, 2048", Sliders(0, INSTANCES, 0, 2048), Policy(ttft_margin=1.0))
ONE_TOKEN, HYBRID = "one token", "hybrid"
FAMILIES = (HYBRID, "disaggregation", "aggregation")  # the longest to tune first
TTFT, BOTH = "TTFT", "TTFT and TPOT"
Row = dict[str, Any]


@dataclass(frozen=True)
class Bed:
    """A machine, its SLOs (seconds), its host tier (tokens), and a goodput that is about right."""

    profile: str
    ttft: float
    tpot: float
    host: int
    guess: float

    def words(self, slo: str) -> str:
        """The SLO for a table."""
        return f"{self.ttft:g} s" if slo == TTFT else f"{self.ttft:g} s, {self.tpot * 1e3:g} ms"


BEDS = {
    "a100": Bed("qwen2.5-14b-tp1-a100", 10.0, 0.1, 1_000_000, 2.4),
    "h200": Bed("qwen2.5-14b-tp1-h200", 4.0, 0.05, 2_000_000, 9.0),
}


class Cell(NamedTuple):
    """One figure of the tables; `host` in tokens."""

    bed: str
    host: int
    slo: str
    knowing: str
    family: str


class Task(NamedTuple):
    """What a process does for a cell: tunes it, or judges the contender that a row has."""

    cell: Cell
    trace: str
    requests: int
    tuned: Row | None = None


def cells() -> list[Cell]:
    """All of them, those that take longest first."""
    found = [
        Cell(name, host, slo, knowing, family)
        for family in FAMILIES
        for name, bed in BEDS.items()
        for host in (bed.host, 0)
        for slo in (TTFT, BOTH)
        for knowing in PREFIXES
    ]
    alone = (
        Cell(name, host, TTFT, knowing, ONE_TOKEN)
        for name, bed in BEDS.items()
        for host in (bed.host, 0)
        for knowing in PREFIXES
    )
    return [*found, *alone]


@cache
def work(trace: str, one_token: bool = False) -> Workload:
    """The requests of a trace; their answers as they were, or of one token."""
    read = workload(trace, LIMIT, over_limit="skip", arrivals=Arrivals("trace"))
    assert isinstance(read.source, InOrder)
    if not one_token:
        return read
    rows = read.source.trace
    return replace(read, source=InOrder(replace(rows, outputs=array("q", [1] * len(rows)))))


def scene(cell: Cell, trace: str) -> Scene:
    """Eight of these machines."""
    bed = BEDS[cell.bed]
    found = replace(machine(bed.profile), max_model_len=LIMIT)
    slo = SLO(bed.ttft, ANY_TPOT if cell.slo == TTFT else bed.tpot)
    return Scene(found, work(trace, cell.family == ONE_TOKEN), slo, host_kv=cell.host, prefixes=cell.knowing)


def field(family: str) -> list[Contender]:
    """Whom a family is tuned among. The ends of the hybrid are tuned by themselves."""
    baselines = {"aggregation": aggregation, "disaggregation": disaggregation}
    if family in baselines:
        return baselines[family](INSTANCES, LONGEST)
    return [c for c in hybrid(INSTANCES, LONGEST) if end_of(c) is None]


# ------------------------------------------------------------------------------------ one process, one cell


def do(task: Task) -> Row:
    """A row of the file: of a cell that was tuned, or judged."""
    began = time.process_time()
    row = tune(task) if task.tuned is None else judge(task, task.tuned)
    return {"cell": list(task.cell), **row, "seconds": round(time.process_time() - began, 1)}


def tune(task: Task) -> Row:
    """The best contender of a family, and its goodput on the seeds that tune."""
    cell, guess = task.cell, BEDS[task.cell.bed].guess
    if cell.family == ONE_TOKEN:
        return {"stage": "tuned", "rate": guess * 1.3, "contender": asdict(ALIKE)}
    plan = Plan(min(2000, task.requests), TUNING, (), math.nan, math.nan)
    top = guess * 1.25  # the rungs of a race are from half of this to 1.2 of it
    with workers(scene(cell, task.trace), 1) as crew:
        hunt = Hunt(crew, plan, top, Effort(knobs=True), lambda _: None)
        found = hunt.tuned(cell.family, field(cell.family))
    best = max(found, key=lambda one: one.rate)
    return {"stage": "tuned", "rate": best.rate or top / 4, "contender": asdict(best.contender)}


def judge(task: Task, tuned: Row) -> Row:
    """What the contender reaches on the trace as it is."""
    made = tuned["contender"]
    contender = Contender(made["name"], Sliders(**made["sliders"]), Policy(**made["policy"]))
    most = 8 * BEDS[task.cell.bed].guess
    with workers(scene(task.cell, task.trace), 1) as crew:
        (reached,) = climb(crew, [(contender, tuned["rate"])], task.requests, (0,), 0.02, most)
    tally = reached.tally
    row: Row = {"stage": "judged", "contender": contender.name, "goodput": reached.rate}
    if tally is not None:
        row["hit"], row["fetched"] = tally.hit_ratio, tally.fetched_tokens / tally.prompt_tokens
        row |= {f"ttft_p{q}": tally.ttft.quantile(q / 100) for q in (50, 90)}
        row |= {f"tpot_p{q}": tally.tpot.quantile(q / 100) for q in (50, 90)}
    return row


# ------------------------------------------------------------------------------------------------- all of it


def rows_of(path: Path) -> dict[tuple[Cell, str], Row]:
    """What a file has, by cell and stage; a line that was cut off counts as not there."""
    found: dict[tuple[Cell, str], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[Cell(*row["cell"]), row["stage"]] = row
    return found


def run(todo: list[Cell], args: argparse.Namespace) -> None:
    """Tune and judge what is not in the file yet, until the minutes are over."""
    known, end = rows_of(args.out), time.monotonic() + 60 * args.minutes
    pending: list[AsyncResult[Row]] = []
    with Pool(args.processes) as pool, args.out.open("a") as out:  # what is under way at the end is ended

        def begin(cell: Cell, tuned: Row | None) -> None:
            pending.append(pool.apply_async(do, (Task(cell, args.trace, args.requests, tuned),)))

        # Who is tuned already comes first: a judgement is what a table needs.
        for cell in sorted(todo, key=lambda cell: (cell, "tuned") not in known):
            if (cell, "judged") not in known:
                begin(cell, known.get((cell, "tuned")))
        while pending and time.monotonic() < end:
            for one in [p for p in pending if p.ready()]:
                pending.remove(one)
                if not one.successful():  # the others go on; a later call tries it again
                    print(f"failed: {one._value!r}", flush=True)  # type: ignore[attr-defined]
                    continue
                row = one.get()
                out.write(json.dumps(row) + "\n")
                out.flush()
                print(*row["cell"], row["stage"], f"{row['seconds']} s; {len(pending)} more", flush=True)
                if row["stage"] == "tuned":
                    begin(Cell(*row["cell"]), row)
            time.sleep(0.1)


def one_cache(wanted: Workload, requests: int, tokens: int) -> float:
    """The share of prompt tokens that one cache of so many tokens has, the longest unused forgotten first."""
    size, room = wanted.block_size, tokens // wanted.block_size
    kept: OrderedDict[int, None] = OrderedDict()
    cached = total = 0
    for call in wanted.requests(1.0, requests, 0):
        most = (call.prompt_tokens - 1) // size
        there = next((n for n, b in enumerate(call.blocks[:most]) if b not in kept), most)
        cached, total = cached + there * size, total + call.prompt_tokens
        for block in reversed(call.blocks[: (call.prompt_tokens + call.output_tokens - 1) // size]):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > room:
            kept.popitem(last=False)
    return cached / total


def tables(judged: dict[Cell, Row], args: argparse.Namespace) -> Iterator[str]:
    """A table for each machine, tier and SLO: families down, what is known across."""
    for name, host, slo in dict.fromkeys(cell[:3] for cell in judged):
        bed = BEDS[name]
        room = INSTANCES * max(machine(bed.profile).kv_capacity, host)
        ideal = one_cache(work(args.trace), args.requests, room)
        tier = f"{host:,} tokens of host tier" if host else "GPU only"
        yield f"\n{name}, {bed.words(slo)}, {tier}; one cache of {room:,} tokens: {ideal:.1%}\n"
        yield "| | " + " | ".join(PREFIXES) + " |"
        yield "|---|" + "---|" * len(PREFIXES)
        mine = {(c.family, c.knowing): row for c, row in judged.items() if c[:3] == (name, host, slo)}
        for family in dict.fromkeys(f for f, _ in mine):
            yield f"| {family} | " + " | ".join(_figures(mine, family, k) for k in PREFIXES) + " |"
        if leads := [_lead(mine, knowing) for knowing in PREFIXES]:
            yield "| hybrid between the ends, against the better of the two | " + " | ".join(leads) + " |"


def _figures(mine: dict[tuple[str, str], Row], family: str, knowing: str) -> str:
    row, blind = mine.get((family, knowing)), mine.get((family, PREFIXES[0]))
    if row is None:
        return "-"
    gain = f" ({row['goodput'] / blind['goodput'] - 1:+.0%})" if blind and row is not blind else ""
    fetched = f", {row['fetched']:.1%} fetched" if row.get("fetched") else ""
    return f"{row['goodput']:.2f}/s{gain}, hit {row.get('hit', 0):.1%}{fetched}: {row['contender']}"


def _lead(mine: dict[tuple[str, str], Row], knowing: str) -> str:
    rates = {family: row["goodput"] for (family, known), row in mine.items() if known == knowing}
    if not set(FAMILIES) <= set(rates):
        return "-"
    return f"{rates[HYBRID] / max(rates['aggregation'], rates['disaggregation']) - 1:+.1%}"


def main() -> None:
    """Do what is left to do, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; what is in it is not done again")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--requests", type=int, default=12_031, help="of the trace that judge")
    parser.add_argument("--only", choices=BEDS)
    parser.add_argument("--host", type=int, help="only this tier, in tokens")
    parser.add_argument("--slo", choices=(TTFT, BOTH))
    parser.add_argument("--family", choices=(*FAMILIES, ONE_TOKEN))
    args = parser.parse_args()
    chosen = {"bed": args.only, "host": args.host, "slo": args.slo, "family": args.family}
    wanted = {name: value for name, value in chosen.items() if value is not None}
    todo = [c for c in cells() if wanted.items() <= c._asdict().items()]
    work(args.trace), work(args.trace, one_token=True)  # read once, before there are processes
    run(todo, args)
    judged = {c: row for (c, stage), row in rows_of(args.out).items() if stage == "judged" and c in todo}
    print(*tables(judged, args), sep="\n")


if __name__ == "__main__":
    main()
