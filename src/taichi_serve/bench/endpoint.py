"""A running server, met over HTTP: which model it serves, how long a request may be, and when it is idle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from taichi_serve.bench.client import swift
from taichi_serve.messages import Move

T = TypeVar("T")
SETTLE_SECONDS = 60.0
Instances = dict[str, int | None]  # of a server of ours: the process of each, None for one that is not alive


class EndpointError(ValueError):
    """A server that cannot be measured; the message names it and says why."""


class EndpointGoneError(RuntimeError):
    """A server that was measured, and is gone or stuck; the message names it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that has answered."""

    client: httpx.AsyncClient
    model: str
    limit: int  # tokens of prompt and output together
    version: str

    async def settle(self) -> None:
        """Wait until nothing of the last run is left; EndpointGoneError when the server is gone or stuck.

        A server of ours says how many requests are live. Of another one, an answer to one short request is
        asked for: engines take an abort before what was sent after it.
        """
        url = self.client.base_url
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                while True:
                    if not await self._live():
                        return
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise EndpointGoneError(f"{url}: still busy after {SETTLE_SECONDS:g} s without load") from None
        except httpx.HTTPError as wrong:
            raise EndpointGoneError(f"{url}: it is gone: {wrong!r}") from None

    async def instances(self) -> Instances:
        """The instances as the server has them now; empty for a server that is not ours, or does not answer.

        What is measured does not hang on it: whether the server is there at all, `settle` finds out.
        """
        return await self._of_state(
            lambda state: {
                str(row["name"]): row.get("pid", 0) if row["alive"] else None for row in state["instances"]
            }
        )

    async def moves(self) -> dict[str, int]:
        """How often requests have moved so far, by why; empty for a server that is not ours, or does not
        answer."""

        def counted(state: Any) -> dict[str, int]:
            counts = state["moves"]
            return {move.value: int(counts.get(move.value, 0)) for move in Move} if counts else {}

        return await self._of_state(counted)

    async def _of_state(self, read: Callable[[Any], dict[str, T]]) -> dict[str, T]:
        """What is read out of the server's state; nothing where there is none, or another one."""
        try:
            answer = await self.client.get("/taichi/state", timeout=SETTLE_SECONDS)
            return read(answer.json()) if answer.status_code == 200 else {}
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError):
            return {}

    async def _live(self) -> int:
        answer = await self.client.get("/taichi/state")
        if answer.status_code == 200:
            return int(answer.json()["requests"]["live"])
        body = {"model": self.model, "prompt": [300], "max_tokens": 1}
        (await self.client.post("/v1/completions", json=body)).raise_for_status()
        return 0


def gone(before: Instances, after: Instances) -> tuple[str, ...]:
    """Those that were not there all the time: not alive at one of the two times, or started anew between."""
    return tuple(
        name for name, process in before.items() if process is None or after.get(name, process) != process
    )


def client_of(url: str, authorization: str | None) -> httpx.AsyncClient:
    """For any number of requests at once. ValueError or httpx.InvalidURL where it is no URL."""
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": authorization} if authorization else {},
        timeout=httpx.Timeout(None, connect=30.0),
        transport=swift(),
        trust_env=False,
    )


@contextlib.asynccontextmanager
async def meet(url: str, api_key: str | None) -> AsyncIterator[Endpoint]:
    """Ask a server what it serves. Any number of requests may be open at once."""
    try:
        if (httpx.URL(url).port or 80) > 65535:
            raise ValueError("its port is above 65535")
        client = client_of(url, f"Bearer {api_key}" if api_key else None)
    except (httpx.InvalidURL, ValueError) as wrong:
        raise EndpointError(f"{url}: no URL of a server: {wrong}") from None
    async with client:
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                model = await _model(client, url)
                version = await client.get("/version")
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as wrong:
            why = str(wrong) or type(wrong).__name__
            raise EndpointError(f"{url}: cannot be reached: {why}") from None
        name = version.json().get("version", "?") if version.status_code == 200 else "?"
        yield Endpoint(client, model["id"], int(model.get("max_model_len") or 1 << 20), str(name))


async def _model(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    answer = await client.get("/v1/models")
    try:
        model: dict[str, Any] = answer.raise_for_status().json()["data"][0]
        model["id"]
    except httpx.HTTPStatusError:
        raise EndpointError(f"{url}: HTTP {answer.status_code} to GET /v1/models") from None
    except (ValueError, LookupError, TypeError):
        raise EndpointError(f"{url}: no OpenAI server: no model in its answer to GET /v1/models") from None
    return model
