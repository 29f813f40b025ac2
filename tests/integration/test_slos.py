"""SLOs of single requests on a real server: who brings what, how it is judged, and where that can be read."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from load import PATH
from servers import Server, until

KEYS = ("everybodys", "sk-app")
CLASSES = {
    "interactive": {"ttft_slo": 30, "tpot_slo": 5, "keys": ["sk-app"]},
    "batch": {"ttft_slo": 600, "tpot_slo": 60, "ttft_bounds": [100, 3600]},
}
OK: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """i0 P-heavy and i1 D-heavy; the server's own SLO is one that this machine keeps."""
    server = Server(
        tmp_path_factory.mktemp("slos"),
        *("--p-heavy", "1", "--d-heavy", "1", "--ttft-slo", "40", "--tpot-slo", "4"),
        *("--api-key", *KEYS, "--metrics-without-key", "--slo-response-headers"),
        *("--slo-classes", json.dumps(CLASSES)),
    )
    server.headers = {"Authorization": f"Bearer {KEYS[0]}"}
    try:
        yield server.wait_ready()
        server.stop()
    finally:
        server.end()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


async def told(client: httpx.AsyncClient, **headers: str) -> tuple[dict[str, Any], httpx.Response]:
    """A request with these headers: what the server recorded of its arrival, and the answer."""
    spelled = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await client.post(PATH, json=OK, headers=spelled, timeout=60)
    assert answer.status_code == 200, answer.text
    record = (await client.get(f"/taichi/requests/{answer.json()['id']}")).json()
    (arrived,) = [entry for entry in record["requests"][0]["log"] if entry["type"] == "Arrived"]
    return arrived, answer


async def judged(client: httpx.AsyncClient) -> dict[tuple[str, str, str], float]:
    """taichi_slo_requests_total by class, SLO and whether it was met."""
    text = (await client.get("/metrics/")).text
    found = re.findall(r'taichi_slo_requests_total\{class="(\w+)",met="(\w+)",slo="(\w+)"\} (\S+)', text)
    return {(name, slo, met): float(count) for name, met, slo, count in found}


async def test_each_request_is_judged_by_what_it_brought(client: httpx.AsyncClient) -> None:
    plain, answer = await told(client)
    assert (plain["slo"], plain["slo_class"]) == (None, None)
    assert answer.headers["x-taichi-slo-ttft-ms"] == "40000"
    own, answer = await told(client, x_slo_ttft_ms="0.001", x_llm_d_slo_tpot_ms="2500")
    assert (own["slo"], own["slo_class"]) == ({"ttft": 1e-6, "tpot": 2.5}, None)
    assert answer.headers["x-taichi-slo-tpot-ms"] == "2500"
    named, answer = await told(client, x_slo_class="batch", x_slo_tpot_ms="70000")
    assert (named["slo"], named["slo_class"]) == ({"ttft": 600.0, "tpot": 70.0}, "batch")
    assert answer.headers["x-taichi-slo-class"] == "batch"
    keyed, _ = await told(client, Authorization="Bearer sk-app")
    assert (keyed["slo"], keyed["slo_class"]) == ({"ttft": 30.0, "tpot": 5.0}, "interactive")

    async def over() -> bool:
        found = await judged(client)
        return sum(count for (_, slo, _), count in found.items() if slo == "both") == 4

    await until(over, 10, "four requests are judged")
    counts = await judged(client)
    assert counts["default", "ttft", "true"] == 1
    assert counts["default", "ttft", "false"] == 1  # a microsecond is too little for anybody
    assert counts["default", "both", "false"] == 1
    assert counts["default", "tpot", "true"] == 2
    assert (counts["batch", "both", "true"], counts["interactive", "both", "true"]) == (1, 1)
    classes = (await client.get("/taichi/state")).json()["classes"]
    assert classes["batch"] == {"slo": {"ttft": 600.0, "tpot": 60.0}, "judged": 1, "good": 1}
    assert "sk-app" not in (await client.get("/taichi/state")).text


async def test_slos_are_edges_of_vllms_own_histograms(client: httpx.AsyncClient) -> None:
    await told(client)
    text = (await client.get("/metrics/")).text
    edges = {
        name: set(re.findall(rf'vllm:{name}_bucket\{{[^}}]*le="([^"]+)"', text))
        for name in ("time_to_first_token_seconds", "request_time_per_output_token_seconds")
    }
    assert {"30.0", "40.0", "600.0", "2.5"} <= edges["time_to_first_token_seconds"]
    assert {"4.0", "5.0", "60.0", "0.05"} <= edges["request_time_per_output_token_seconds"]


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize(
    ("header", "value", "says"),
    [
        ("x-slo-ttft-ms", "soon", "expected a positive number of milliseconds, not 'soon'"),
        ("x-llm-d-slo-tpot-ms", "-1", "expected a positive number of milliseconds, not '-1'"),
        ("x-slo-class", "interactive", "no class 'interactive' for this client; there are batch"),
    ],
)
async def test_bad_headers_are_one_400_that_names_them(
    client: httpx.AsyncClient, path: str, header: str, value: str, says: str
) -> None:
    answer = await client.post(path, json=OK, headers={header: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] == f"{header}: {says}."
    if path == "/v1/messages":  # Anthropic's form
        assert error["type"] == "invalid_request_error"
    else:
        assert (error["param"], error["code"]) == (header, 400)


async def test_what_is_asked_beyond_the_bounds_of_a_class_names_both(client: httpx.AsyncClient) -> None:
    headers = {"x-slo-class": "batch", "x-slo-ttft-ms": "500"}
    answer = await client.post(PATH, json=OK, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "x-slo-ttft-ms: 500 ms is not within the bounds of class batch, 100000 to 3600000 ms."
    )
