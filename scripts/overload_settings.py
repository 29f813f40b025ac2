"""What scripts/overload.py runs: the settings of docs/paper.md, with the sliders that are tuned there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.workload import workload
from taichi_serve.latency.shipped import machine
from taichi_serve.scheduling.policy import Policy
from taichi_serve.search.goodput import Contender, Scene
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

WHOLE = 8192  # tokens of a chunk that holds any prompt, or nearly


@dataclass(frozen=True)
class Setting:
    """A row of a table of docs/paper.md: `guesses` are the goodputs there (requests/s), where the search for
    each own one begins, `seconds` of traffic a run has."""

    name: str
    profile: str
    load: str
    slo: SLO
    families: tuple[Contender, ...]
    guesses: tuple[float, ...]
    seconds: float


def scene(setting: Setting, arrivals: Arrivals) -> Scene:
    """What it runs on."""
    found = machine(setting.profile)
    limit = min(found.max_model_len, found.kv_capacity)
    return Scene(found, workload(setting.load, limit, arrivals=arrivals), setting.slo)


def families(instances: int, chunk: int, p_heavy: int, hybrid: Contender) -> tuple[Contender, ...]:
    """The three, as they are tuned; `p_heavy` is that of disaggregation."""
    together = Contender("aggregation", Sliders(0, instances, 0, chunk), Policy(ttft_margin=1.0))
    apart = Contender(
        "disaggregation",
        Sliders(p_heavy, instances - p_heavy, WHOLE, 0),
        Policy(ttft_margin=1.0, watermark=1.0),
    )
    return together, apart, hybrid


def hybrid(p_heavy: int, d_heavy: int, p_chunk: int, d_chunk: int, margin: float = 0.5) -> Contender:
    """As tuned for docs/paper.md."""
    return Contender("hybrid", Sliders(p_heavy, d_heavy, p_chunk, d_chunk), Policy(ttft_margin=margin))


A14, B32, L70 = "qwen2.5-14b-tp1-a100", "qwen2.5-32b-tp2-a100", "llama-2-70b-tp4-a100"
LONG, CHAT = 300.0, 100.0  # seconds of traffic: chats are many a second


def settings(arxiv: str | None) -> Iterator[Setting]:
    """Those whose workload is made, and those of Table 2 where there is the file of its lengths."""
    yield _made(
        "14b", A14, "summarization", SLO(6, 0.05), (8, 256, 5, hybrid(5, 3, WHOLE, 96)), (4.7, 5.4, 6.3)
    )
    yield _made(
        "14b", A14, "summarization", SLO(4, 0.07), (8, 384, 6, hybrid(4, 4, WHOLE, 256, 0.3)), (5.7, 5.6, 6.2)
    )
    yield _made(
        "32b", B32, "summarization", SLO(4, 0.07), (4, 384, 3, hybrid(3, 1, WHOLE, 128, 0.3)), (2.2, 2.4, 2.6)
    )
    yield _made(
        "32b", B32, "summarization", SLO(6, 0.05), (4, 128, 3, hybrid(3, 1, WHOLE, 64)), (1.7, 2.6, 2.8)
    )
    yield _made(
        "32b", B32, "sharegpt", SLO(3, 0.11), (4, 384, 2, hybrid(2, 2, WHOLE, 128, 0.3)), (25.0, 22.0, 26.0)
    )
    yield _made(
        "32b", B32, "sharegpt", SLO(4, 0.07), (4, 256, 2, hybrid(2, 2, WHOLE, 64)), (24.0, 22.0, 25.0)
    )
    if arxiv:
        yield _made("70b", L70, arxiv, SLO(6, 0.1), (8, 384, 6, hybrid(6, 2, 4096, 128)), (10.6, 11.8, 13.1))
        yield _made("70b", L70, arxiv, SLO(5, 0.25), (8, 768, 6, hybrid(7, 1, 4096, 16)), (12.7, 11.6, 13.4))
        yield _made("70b", L70, arxiv, SLO(16, 0.06), (8, 128, 6, hybrid(6, 2, 4096, 0)), (8.1, 13.3, 13.3))
    yield _made(
        "14b", A14, "sharegpt", SLO(4, 0.07), (8, 256, 4, hybrid(4, 4, WHOLE, 32)), (53.0, 54.0, 58.0)
    )
    yield _made(
        "14b", A14, "sharegpt", SLO(3, 0.11), (8, 2048, 4, hybrid(5, 3, WHOLE, 0)), (56.0, 56.0, 58.0)
    )


def _made(
    size: str,
    profile: str,
    load: str,
    slo: SLO,
    tuned: tuple[int, int, int, Contender],
    guesses: tuple[float, ...],
) -> Setting:
    kind = "arxiv" if load not in ("summarization", "sharegpt") else load
    name = f"{size}-{kind}-{slo.ttft:g}s-{slo.tpot * 1e3:g}ms"
    seconds = CHAT if kind == "sharegpt" else LONG
    return Setting(name, profile, load, slo, families(*tuned), guesses, seconds)
