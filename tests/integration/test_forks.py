"""Where Python starts a thread by itself, engine processes are programs of their own, and work as ever."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from load import completed, wishes
from servers import SOURCE, Server, processes, until

TRACER = """
import threading
threading.Thread(target=threading.Event().wait, name="tracer", daemon=True).start()
"""
BACK_SECONDS = 120


async def test_a_tracer_in_every_python_costs_one_warning_and_no_request(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / "traced").mkdir()
    (tmp_path / "traced" / "sitecustomize.py").write_text(TRACER)
    path = {"PYTHONPATH": f"{tmp_path / 'traced'}:{SOURCE}"}
    server = Server(tmp_path_factory.mktemp("traced"), "--d-heavy", "2", env=path)
    wish = wishes(1, seed=5, prompt=(200, 300), output=(30, 40))[0]
    try:
        server.wait_ready()
        (warning,) = [line for line in server.lines() if "not forked" in line]
        assert "programs of their own: what Python imports here runs threads (tracer); each takes" in warning
        children = psutil.Process(server.process.pid).children()
        assert not [child for child in children if "core.forks" in " ".join(child.cmdline())]
        async with server.client() as client:
            first = await completed(client, wish.body())
            assert len(first.tokens) == wish.max_tokens
            processes(server, "i0")[0].kill()

            async def back() -> bool:
                one = server.instance("i0")
                return bool(one["alive"]) and one["restarts"] == 1

            assert (await completed(client, wish.body())).tokens == first.tokens
            await until(back, BACK_SECONDS, "i0 is back")
            assert (await completed(client, wish.body())).tokens == first.tokens
        assert [line for line in server.lines() if "not forked" in line] == [warning]
        server.stop(logs_stay=True)
    finally:
        server.end()
