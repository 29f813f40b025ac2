"""Bodies that nobody means well with, at every route of ours: one clear 400, and nothing is changed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scraping import with_everything
from starlette.exceptions import HTTPException

from taichi_serve.frontend import routes, scaling
from taichi_serve.frontend.application import http_error

ROUTES = [
    ("POST", "/taichi/instances"),
    ("PATCH", "/taichi/sliders"),
    ("PATCH", "/taichi/slo"),
    ("POST", "/taichi/requests/a/flow"),
]
HUGE = "9" * 400
# Of every name that some route knows.
NAMES = ("kind", "devices", "chunk", "p_heavy", "d_heavy", "p_chunk", "d_chunk", "ttft", "tpot", "to")


class Door:
    """The routes over a system in miniature, that notes what it would do."""

    def __init__(self) -> None:
        self.did: list[Any] = []
        system: Any = with_everything()
        system.cluster.tell = self.did.append
        system.front.behind = lambda request_id: []
        system.front.closing = False
        system.max_chunk = 2048
        system.elastic = SimpleNamespace(add=lambda *words: self.did.append(words) or "i2", leaving={})
        app = FastAPI()
        app.state.taichi = system
        app.include_router(routes.router)
        app.include_router(scaling.router)
        app.exception_handler(HTTPException)(http_error)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")

    async def refused(self, method: str, path: str, body: bytes) -> str:
        """Its words on this body."""
        answer = await self.client.request(method, path, content=body)
        assert (answer.status_code, self.did) == (400, []), answer.text
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", 400)
        assert len(answer.content) < 10_000
        return str(error["message"])


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested more than 64 levels deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested more than 64 levels deep"),
        (b'{"kind": "d-heavy", "kind": "p-heavy"}', "'kind' is there twice"),
        (b'{"ttft": NaN}', "NaN is no number in JSON"),
        (b'{"ttft": -Infinity}', "-Infinity is no number in JSON"),
        (b'{"ttft": ' + b"9" * 5000 + b"}", "not acceptable"),
        (b'{"to": "\xff"}', "not UTF-8: invalid start byte at byte 8"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b"no json", "the body must be"),
        (b"[]", "the body must be"),
        (b"7", "the body must be"),
        (b"null", "the body must be"),
        (b'{"\\ud800": 1}', "body must be|unknown"),
        (b'{"' + b"n" * 1_000_000 + b'": 1}', "body must be|unknown"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_what_is_no_object_that_we_take_changes_nothing(
    method: str, path: str, body: bytes, says: str
) -> None:
    said = await Door().refused(method, path, body)
    assert any(part in said for part in says.split("|"))


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "value",
    [HUGE, f"-{HUGE}", "1e999", "-1", "1.5", "true", "[]", "{}", '"\\ud800"', json.dumps("x" * 100_000)],
    ids=lambda value: str(value)[:10],
)
async def test_a_value_that_cannot_be_is_refused(method: str, path: str, name: str, value: str) -> None:
    door, body = Door(), f'{{"{name}": {value}}}'.encode()
    answer = await door.client.request(method, path, content=body)
    if (name, value) == ("ttft", "1.5") or (name, value) == ("tpot", "1.5"):
        return  # this one can be
    if name == "to" and path.endswith("flow") and value.startswith('"'):
        assert answer.status_code == 404
    else:
        assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
    assert len(answer.content) < 10_000
    assert door.did == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(ROUTES), JSON | st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1, max_size=3))
async def test_no_body_is_the_servers_fault(route: tuple[str, str], body: Any) -> None:
    door = Door()
    answer = await door.client.request(*route, content=json.dumps(body, allow_nan=True).encode())
    assert answer.status_code < 500
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]
        assert door.did == []
