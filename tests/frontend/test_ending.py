"""How `taichi serve` ends: the exit code says whether somebody asked for it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from taichi_serve.frontend import server
from taichi_serve.frontend.ending import Ending
from taichi_serve.frontend.system import drive_ended


@contextlib.contextmanager
def no_socket() -> Any:
    yield None


async def ended(monkeypatch: pytest.MonkeyPatch, closing: bool, scheduler: Exception | None = None) -> int:
    """Serve over a system without engines, whose HTTP server ends at once; `closing`: a signal had come."""
    ending = Ending()
    system = SimpleNamespace(ending=ending, fail=ending.fail, front=SimpleNamespace(closing=closing))

    @contextlib.asynccontextmanager
    async def running(args: Any, argv: list[str], start: Any) -> AsyncIterator[Any]:
        yield system

    async def serve_http(*args: Any) -> None:
        async def drive() -> None:
            if scheduler is not None:
                raise scheduler

        task = asyncio.create_task(drive())
        await asyncio.wait([task])
        drive_ended(system, task)

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


def test_a_stop_that_takes_too_long_is_ended_by_force_and_says_where_it_hung() -> None:
    hung = (
        "from taichi_serve.frontend.ending import no_longer_than\n"
        "import threading\n"
        "no_longer_than(0.1, lambda: 0)\n"
        "threading.Event().wait(30)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", hung], capture_output=True, text=True, timeout=20, check=False
    )
    assert ended.returncode == 0
    assert "stopping took longer than 0.1 s: ended by force" in ended.stderr
    assert "wait" in ended.stderr
