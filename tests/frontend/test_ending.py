"""How `taichi serve` ends: the exit code says whether somebody asked for it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from taichi_serve.frontend import server
from taichi_serve.frontend.ending import Ending


@contextlib.contextmanager
def no_socket() -> Any:
    yield None


async def ended(monkeypatch: pytest.MonkeyPatch, closing: bool, scheduler: Exception | None = None) -> int:
    """Serve over a system without engines, whose HTTP server ends at once; `closing`: a signal had come."""
    ending = Ending()
    system = SimpleNamespace(ending=ending, fail=ending.fail, llm=SimpleNamespace(closing=closing))

    @contextlib.asynccontextmanager
    async def running(args: Any, argv: list[str]) -> AsyncIterator[Any]:
        yield system

    async def serve_http(*args: Any) -> None:
        async def drive() -> None:
            if scheduler is not None:
                raise scheduler

        task = asyncio.create_task(drive())
        await asyncio.wait([task])
        server._drive_ended(system, task)

    monkeypatch.setattr(server, "running", running)
    monkeypatch.setattr(server, "_serve_http", serve_http)
    monkeypatch.setattr(server, "setup_server", lambda args, reuse_port: ("http://x", no_socket()))
    monkeypatch.setattr(signal, "raise_signal", lambda number: None)
    return await server.serve(argparse.Namespace(port=1), [])


@pytest.mark.parametrize(
    ("closing", "scheduler", "status", "said"),
    [
        (True, None, 0, "taichi: stopped\n"),
        (False, None, 3, "taichi: stopped: nobody asked for it\n"),
        (True, RuntimeError("books"), 3, "taichi: stopped: the scheduler failed: RuntimeError('books')\n"),
    ],
)
async def test_an_end_that_nobody_asked_for_has_another_exit_code_than_0(
    closing: bool,
    scheduler: Exception | None,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert await ended(monkeypatch, closing, scheduler) == status
    assert capsys.readouterr().err.endswith(said)
