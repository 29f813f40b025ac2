from __future__ import annotations

import asyncio
from typing import Any

import httpx
import prefixes
import pytest
from conversing import InTurn, prefix_tokens, words

METRICS = """# TYPE taichi_prefix_tokens counter
taichi_prefix_tokens_total{engine="0",of="predicted"} 128.0
taichi_prefix_tokens_total{engine="0",of="actual"} 256.0
taichi_prefix_tokens_total{engine="1",of="predicted"} 1e+03
taichi_prefix_tokens_created{engine="1",of="predicted"} 1.7e9
"""


def test_prefix_tokens_are_summed_over_instances_and_nought_where_a_server_has_none() -> None:
    assert prefix_tokens(METRICS) == {"predicted": 1128.0, "actual": 256.0}
    assert prefix_tokens("vllm:prompt_tokens_total 5.0") == {"predicted": 0.0, "actual": 0.0}


def test_requests_go_to_one_server_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def answer(_: object, request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.url.host}:{request.url.port}{request.url.path}")
        return httpx.Response(200)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", answer)

    async def ask() -> None:
        servers = InTurn(["http://a:1", "http://b:2"])
        async with httpx.AsyncClient(transport=servers, base_url="http://a:1") as client:
            for _ in range(3):
                await client.get("/v1/models")

    asyncio.run(ask())
    assert asked == ["a:1/v1/models", "b:2/v1/models", "a:1/v1/models"]


def row(ttft: float, cached: float, predicted: float = 0.0, actual: float = 0.0) -> dict[str, Any]:
    found = {"ttft_p50": ttft, "cached": cached, "predicted": predicted, "actual": actual}
    return found | {
        "ttft_p90": None,
        "tpot_p50": 0.01,
        "tpot_p90": 0.02,
        "attainment": 1.0,
        "sent": 2,
        "failed": 0,
    }


def test_ratios_are_of_rounds_and_bounds_are_judged_by_their_median() -> None:
    rounds = [
        {"blind": row(0.2, 0.3), "fetch": row(0.1, 0.70, 100, 101), "one": row(0.1, 0.74)},
        {"blind": row(0.1, 0.3), "fetch": row(0.07, 0.70, 100, 101), "one": row(0.1, 0.74)},
        {"blind": row(0.1, 0.3), "fetch": row(0.065, 0.70, 100, 101), "one": row(0.1, 0.80)},
    ]
    said = prefixes.report(rounds)
    assert "median TTFT, fetch over blind: 0.650  MISSES 0.6  of 0.500 0.700 0.650" in said
    assert "cached, fetch below one cache as large as all: 4.0 points  within 0.05" in said
    assert any(line.startswith("fetch ") and "0.99% off  within 0.02" in line for line in said)
    assert not any("stock" in line for line in said)


def test_a_row_is_told_in_one_line_with_what_is_not_known() -> None:
    said = words(row(0.1, 0.5, 98, 100))
    assert "cached 50.0 %, TTFT p50 100.0 p90 ? ms" in said
    assert "predicted 98 actual 100 (2.0% off)" in said
