"""Send the demo's requests when they are due, move one of them by hand, and show how far it is."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from taichi_serve.bench.client import Answer, stream
from taichi_serve.commands.rows import Row, row
from taichi_serve.commands.workload import Planned
from taichi_serve.slo import SLO

MOVE_AFTER = 40  # tokens of the request that is moved by hand


class Load:
    """One run against one server."""

    def __init__(self, url: str, model: str, slo: SLO, console: Console) -> None:
        self._model, self._slo, self._console = model, slo, console
        self._client = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(120.0), trust_env=False)
        self._running = 0
        self._good = 0

    async def run(self, planned: list[Planned]) -> tuple[list[Row], dict[str, Any]]:
        """Send everything; the rows in the order sent, and the server's state after the last."""
        columns = (
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[running]} running, {task.fields[good]} good"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            bar = progress.add_task("requests", total=len(planned), running=0, good=0)

            async def one(what: Planned) -> Row:
                await asyncio.sleep(what.at)
                self._running += 1
                progress.update(bar, running=self._running)
                done = await self._send(what)
                self._running -= 1
                self._good += done.good
                progress.update(bar, advance=1, running=self._running, good=self._good)
                return done

            async with self._client:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(what)) for what in planned]
                state = (await self._client.get("/taichi/state")).raise_for_status().json()
        return [task.result() for task in tasks], state

    async def _send(self, what: Planned) -> Row:
        asked = False

        async def watch(answer: Answer) -> None:
            nonlocal asked
            if len(answer.times) >= MOVE_AFTER and not asked:
                asked = await self._move_by_hand(answer.id)

        body = what.body(self._model)
        answer = await stream(self._client, what.path, body, watch if what.by_hand else None)
        return row(what, answer, await self._record(answer.id), self._slo)

    async def _record(self, request_id: str) -> dict[str, Any] | None:
        if not request_id:
            return None
        response = await self._client.get(f"/taichi/requests/{request_id}")
        if response.status_code != 200:
            return None
        record: dict[str, Any] = response.json()["requests"][0]
        return record

    async def _move_by_hand(self, request_id: str) -> bool:
        """What an operator would do: see where it is, and send it to the other instance."""
        record = await self._record(request_id)
        if record is None or not record["legs"]:
            return False
        here = record["legs"][-1]["instance"]
        to = "i0" if here == "i1" else "i1"
        route = f"/taichi/requests/{request_id}/flow"
        response = await self._client.post(route, json={"to": to})
        self._console.print(f'by hand  POST {route} {{"to": "{to}"}}: {response.status_code}', soft_wrap=True)
        return response.status_code == 202
