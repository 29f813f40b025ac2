"""The worked examples of docs/algorithms.md, computed again from the numbers that stand there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from taichi_serve.instance import Instance
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.profiled import Profiled
from taichi_serve.messages import Flowed, Stepped
from taichi_serve.request import Request, State
from taichi_serve.scheduling.decode import choose_backflow, choose_degrade
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.prefill import Known, choose_prefill
from taichi_serve.scheduling.residency import Prefix
from taichi_serve.scheduling.residents import Residents
from taichi_serve.sliders import Kind
from taichi_serve.slo import SLO, tpot

SLO_4S = SLO(ttft=4.0, tpot=0.1)
DOC = Path(__file__).parents[2] / "docs" / "algorithms.md"
Row = dict[str, str]


def tables() -> list[list[Row]]:
    """Every table of the document, as rows by column name."""
    found: list[list[Row]] = []
    head: list[str] = []
    for line in DOC.read_text().splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            head = []
        elif not head:
            head = cells
            found.append([])
        elif set(cells[0]) - {"-", ":"}:
            found[-1].append(dict(zip(head, cells, strict=True)))
    return found


SHORT, LONG, LATE, TURN, DEGRADING, BACKFLOW = tables()


@dataclass
class ByHand:
    """What the document says: time per prompt token by kind, one time for a move, one per output token."""

    move_seconds: float
    tpots: dict[str, float]

    def ttft(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        per_token = 0.0001 if instance.kind is Kind.P_HEAVY else 0.0004
        return (instance.queued_prefill_tokens + prompt_tokens - cached) * per_token

    def work(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        per_token = 0.0001 if instance.kind is Kind.P_HEAVY else 0.0004
        return (prompt_tokens - cached) * per_token

    def since(self, instance: Instance, elapsed: float) -> float:
        return 0.0

    def tpot(self, instance: Instance, kv_tokens: int) -> float:
        return self.tpots.get(instance.name, 0.03)

    def move(self, source: Instance, target: Instance, kv_tokens: int, held: int = 0) -> float:
        return self.move_seconds

    def fetch(self, source: Instance, target: Instance, kv_tokens: int) -> float:
        return self.move_seconds

    def stepped(self, instance: Instance, step: Stepped) -> None: ...

    def flowed(self, source: Instance, target: Instance, move: Flowed) -> None: ...


@pytest.mark.parametrize(
    ("rows", "prompt", "margin"),
    [(SHORT, 500, 0.5), (LONG, 6000, 0.5), (LATE, 6000, 0.5), (TURN, 6000, 0.5)],
    ids=["short", "long", "late", "turn"],
)
def test_algorithm_2_as_in_the_document(rows: list[Row], prompt: int, margin: float) -> None:
    instances = [
        Instance(r["instance"], Kind(r["kind"]), 256, 1_000_000, queued_tokens=int(r["queued tokens"]))
        for r in rows
    ]
    decoders = [i for i in instances if i.kind is Kind.D_HEAVY]
    cached = {r["instance"]: int(r.get("cached", 0)) for r in rows}
    known = Known({name: Prefix(tokens, tokens) for name, tokens in cached.items() if tokens})
    placed = choose_prefill(
        Request("r", 0.0, prompt, 100, SLO_4S), 0.0, instances, decoders, ByHand(0.1, {}),
        Policy(ttft_margin=margin), known,
    )  # fmt: skip
    assert [f.cached for f in placed.forecasts] == [*cached.values()]
    for row, forecast in zip(rows, placed.forecasts, strict=True):
        assert forecast.ttft == pytest.approx(float(row["TTFT (s)"]))
        assert forecast.feasible == (row["feasible"] == "yes")
        assert (forecast.instance == placed.instance.name) == (row["taken"] == "yes")
    assert placed.hand_over == (placed.instance.kind is Kind.P_HEAVY)


def test_literal_algorithm_2_takes_the_d_heavy_edge_of_the_slo() -> None:
    instances = [
        Instance(r["instance"], Kind(r["kind"]), 256, 1_000_000, queued_tokens=int(r["queued tokens"]))
        for r in LONG
    ]
    placed = choose_prefill(
        Request("r", 0.0, 6000, 100, SLO_4S), 0.0, instances, instances[1:], ByHand(0.1, {}),
        Policy(ttft_margin=1.0),
    )  # fmt: skip
    assert placed.instance.name == "i2"
    assert [f.feasible for f in placed.forecasts] == [True, True, True]


def residents_of(rows: list[Row], ticks: int) -> tuple[dict[str, Request], Residents]:
    """Decodes that joined the tick clock with their present output."""
    residents, requests = Residents(alpha=0.96, max_degrades=2), {}
    for row in rows:
        request = Request(row["request"], 0.0, int(row["prompt"]), 1000, SLO_4S, state=State.DECODING)
        request.first_at, request.base = float(row["first token at (s)"]), int(row["output"])
        request.joined = ticks
        requests[request.id] = request
        residents.add(request)
    return requests, residents


def test_degrading_as_in_the_document() -> None:
    source = Instance("i1", Kind.D_HEAVY, 256, 10_000, kv_tokens=9_600, ticks=50, decodes=4)
    helper = Instance("i0", Kind.P_HEAVY, 1024, 10_000)
    requests, residents = residents_of(DEGRADING, ticks=50)
    for row in DEGRADING:
        slack = residents.slack(requests[row["request"]], 20.0, 50)
        assert slack == pytest.approx(float(row["slack (s)"])), row
    (expected,) = [row["request"] for row in DEGRADING if row["degraded"] == "yes"]
    by_hand = ByHand(0.05, {})
    choice = choose_degrade(source, residents, requests, [helper], 20.0, by_hand, Policy())
    assert choice is not None
    assert (choice[0].id, choice[1].name) == (expected, "i0")
    source.leaving_tokens = 3_201
    assert choose_degrade(source, residents, requests, [helper], 20.0, by_hand, Policy()) is None


def test_backflow_as_in_the_document() -> None:
    source = Instance("i0", Kind.P_HEAVY, 1024, 10_000, decodes=1)
    target = Instance("i1", Kind.D_HEAVY, 256, 10_000, kv_tokens=5_000)
    request = Request("b", 0.0, 3000, 1000, SLO_4S, state=State.DECODING, first_at=10.0, base=202, joined=0)
    residents = Residents(alpha=0.96, max_degrades=2)
    residents.add(request)
    for row in BACKFLOW:
        source.ticks, now = int(row["step"]), float(row["now (s)"])
        assert request.output_tokens(source.ticks) == int(row["output"])
        running = tpot(10.0, now, request.output_tokens(source.ticks))
        assert running * 1000 == pytest.approx(float(row["running TPOT (ms)"]), abs=0.001)
        by_hand = ByHand(0.05, {"i0": 0.25, "i1": 0.03})
        choice = choose_backflow(source, residents, {"b": request}, [target], now, by_hand, Policy())
        assert (choice is not None) == (row["flows back"] == "yes"), row


def test_ttft_as_in_the_document() -> None:
    predictor = Profiled(Roofline(launch=0.01, token=1e-4), {}, 1)
    instance = Instance("i1", Kind.D_HEAVY, 256, 100_000, queued_tokens=400, running_tokens=256, decodes=10)
    assert predictor.ttft(instance, 600) == pytest.approx(0.1257)
