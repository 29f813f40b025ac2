"""What a client may ask for in headers, and what it hears when it may not."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

pytest.importorskip("vllm")  # the door has vLLM's comparison of keys

from taichi_serve.classes import SLOClass, Terms
from taichi_serve.frontend.body import Intake
from taichi_serve.frontend.guard import Guard
from taichi_serve.frontend.keys import Keys
from taichi_serve.frontend.terms import Promises, TermsError, noted
from taichi_serve.slo import SLO

SERVERS = SLO(4.0, 0.07)
CLASSES = {
    "interactive": SLOClass("interactive", 1.0, 0.04, keys=("sk-app",)),
    "batch": SLOClass("batch", 10.0, 0.2, ttft_bounds=(5.0, 600.0)),
}


def terms(classes: dict[str, SLOClass] | None = None, **headers: str) -> Terms:
    spelled = Headers({name.replace("_", "-"): value for name, value in headers.items()})
    return Promises(CLASSES if classes is None else classes, lambda: SERVERS).of(spelled)


def refused(**headers: str) -> tuple[str, str]:
    with pytest.raises(TermsError) as wrong:
        terms(**headers)
    return wrong.value.header, str(wrong.value)


def test_who_asks_for_nothing_has_the_servers_slo() -> None:
    assert terms() == terms({}) == Terms()


def test_an_slo_in_milliseconds_and_what_is_not_said_is_the_servers() -> None:
    assert terms(x_slo_ttft_ms="2500", x_slo_tpot_ms="40.5") == Terms(SLO(2.5, 0.0405))
    assert terms(x_slo_ttft_ms="2500") == Terms(SLO(2.5, 0.07))
    assert terms(x_llm_d_slo_ttft_ms="2500", x_llm_d_slo_tpot_ms="40") == Terms(SLO(2.5, 0.04))
    assert terms(x_slo_ttft_ms="2500", x_llm_d_slo_ttft_ms="2500.0") == Terms(SLO(2.5, 0.07))


def test_a_class_is_named_or_goes_with_the_key() -> None:
    assert terms(x_slo_class="batch") == Terms(SLO(10.0, 0.2), "batch")
    assert terms(authorization="Bearer sk-app") == Terms(SLO(1.0, 0.04), "interactive")
    assert terms(authorization="Bearer sk-app", x_slo_class="batch") == Terms(SLO(10.0, 0.2), "batch")
    assert terms(x_slo_class="batch", x_slo_ttft_ms="30000") == Terms(SLO(30.0, 0.2), "batch")


def test_the_class_called_default_is_that_of_the_others() -> None:
    known = {"default": SLOClass("default", tpot_bounds=(0.05, 1.0))}
    assert terms(known) == Terms(None, "default")
    with pytest.raises(TermsError, match="40 ms is not within the bounds of class default, 50 to 1000 ms"):
        terms(known, x_slo_tpot_ms="40")


@pytest.mark.parametrize("value", ["", "0", "-5", "nan", "inf", "1e3", "5 ms", "1_000", "９", "1" * 20])
def test_what_is_no_number_of_milliseconds_is_named(value: str) -> None:
    promises = Promises({}, lambda: SERVERS)
    spelled = Headers(raw=[(b"x-slo-ttft-ms", value.encode("utf-8"))])
    with pytest.raises(
        TermsError, match=r"^x-slo-ttft-ms: expected a positive number of milliseconds"
    ) as wrong:
        promises.of(spelled)
    assert wrong.value.header == "x-slo-ttft-ms"


def test_headers_that_contradict_each_other_are_refused() -> None:
    header, said = refused(x_slo_ttft_ms="2500", x_llm_d_slo_ttft_ms="2000")
    assert (header, said) == (
        "x-llm-d-slo-ttft-ms",
        "x-llm-d-slo-ttft-ms: 2000 is not the 2500 of x-slo-ttft-ms.",
    )
    twice = Headers(raw=[(b"x-slo-class", b"batch"), (b"x-slo-class", b"other")])
    with pytest.raises(TermsError, match="x-slo-class: it is there more than once"):
        Promises(CLASSES, lambda: SERVERS).of(twice)


def test_bounds_name_the_header_that_is_beyond_them() -> None:
    assert refused(x_slo_class="batch", x_llm_d_slo_ttft_ms="1000") == (
        "x-llm-d-slo-ttft-ms",
        "x-llm-d-slo-ttft-ms: 1000 ms is not within the bounds of class batch, 5000 to 600000 ms.",
    )


def test_a_class_that_is_not_there_or_is_others_is_the_same_to_a_client() -> None:
    for name in ("gold", "interactive"):
        assert refused(x_slo_class=name) == (
            "x-slo-class",
            f"x-slo-class: no class {name!r} for this client; there are batch.",
        )
    with pytest.raises(TermsError, match="this server has none"):
        terms({}, x_slo_class="batch")


# --------------------------------------------------------------------------------------------- at the door


def door(tell: bool = False) -> tuple[httpx.AsyncClient, list[Terms | None]]:
    got: list[Terms | None] = []

    async def take(_: Request) -> Response:
        got.append(noted())
        return JSONResponse({})

    guard: Any = Middleware(
        Guard, keys=Keys([]), intake=Intake(), promises=Promises(CLASSES, lambda: SERVERS, tell)
    )
    app = Starlette(routes=[Route("/{rest:path}", take, methods=["GET", "POST"])], middleware=[guard])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door"), got


async def test_bad_headers_are_one_400_that_names_them_and_nothing_gets_in() -> None:
    client, got = door()
    answer = await client.post("/v1/completions", content=b"{}", headers={"x-slo-tpot-ms": "fast"})
    assert answer.status_code == 400
    assert answer.json() == {
        "error": {
            "message": "x-slo-tpot-ms: expected a positive number of milliseconds, not 'fast'.",
            "type": "invalid_request_error",
            "param": "x-slo-tpot-ms",
            "code": 400,
        }
    }
    assert got == []


async def test_terms_reach_whoever_serves_the_request_and_are_told_only_where_that_is_wanted() -> None:
    headers = {"x-slo-class": "batch", "x-slo-tpot-ms": "100"}
    for tell, said in ((False, {}), (True, {"ttft-ms": "10000", "tpot-ms": "100", "class": "batch"})):
        client, got = door(tell)
        answer = await client.post("/v1/completions", content=b"{}", headers=headers)
        assert got == [Terms(SLO(10.0, 0.1), "batch")]
        told = {k.removeprefix("x-taichi-slo-"): v for k, v in answer.headers.items() if "taichi" in k}
        assert told == said


async def test_routes_that_make_no_new_work_look_at_no_slo() -> None:
    client, got = door()
    headers = {"x-slo-class": "gold"}
    assert (await client.get("/health", headers=headers)).status_code == 200
    assert (await client.post("/taichi/instances/i0/drain", headers=headers)).status_code == 200
    assert got == [None, None]
