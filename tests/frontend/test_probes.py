"""Whether the process answers is one question, whether it takes requests another; neither needs the key."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from building import application


class Asked:
    """The application, with somebody who says why it is not ready."""

    def __init__(self) -> None:
        self.why: str | None = None
        self.app = application()
        self.app.state.taichi = SimpleNamespace(unready=lambda: self.why)

    async def get(self, path: str) -> httpx.Response:
        transport: Any = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
            return await client.get(path)


@pytest.fixture(scope="module")
def asked() -> Asked:
    return Asked()


async def test_a_server_that_takes_requests_is_live_and_ready(asked: Asked) -> None:
    asked.why = None
    assert (await asked.get("/live")).status_code == 200
    assert (await asked.get("/ready")).status_code == 200


async def test_one_that_does_not_is_live_all_the_same_and_says_why_it_is_not_ready(asked: Asked) -> None:
    asked.why = "No instance is up; one is expected back in about 30 s."
    assert (await asked.get("/live")).status_code == 200
    answer = await asked.get("/ready")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, asked.why)
    assert int(answer.headers["retry-after"]) >= 1


async def test_only_these_two_paths_are_open(asked: Asked) -> None:
    for path in ("/live/", "/ready/", "/ready/x", "/taichi/ready", "/readyz"):
        assert (await asked.get(path)).status_code == 401, path
