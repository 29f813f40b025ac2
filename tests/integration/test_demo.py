"""`taichi demo` as its user runs it: what it shows adds up, and Ctrl-C leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

DEMO = [sys.executable, "-m", "taichi_serve.cli", "demo"]


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path: sockets lie in it, and their names may not be long."""
    return tmp_path_factory.mktemp("d")


def environment(scratch: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(scratch), "COLUMNS": "100"}


def processes_of(scratch: Path) -> list[str]:
    """The command lines of all processes that have this directory in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={scratch}".encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it is gone already
    return found


def test_every_request_ends_and_the_totals_are_the_sums_of_the_rows(scratch: Path) -> None:
    command = [*DEMO, "--requests", "16", "--json", str(scratch / "demo.json")]
    run = subprocess.run(
        command, env=environment(scratch), capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    data = json.loads((scratch / "demo.json").read_text())
    rows, totals = data["rows"], data["totals"]
    assert [row["number"] for row in rows] == list(range(16))
    assert totals["requests"] == 16
    assert totals["failed"] == 0
    assert totals["good"] == sum(row["good"] for row in rows)
    assert totals["output_tokens"] == sum(row["output_tokens"] for row in rows)
    assert totals["prefilled"] == Counter(row["prefilled"] for row in rows)
    assert totals["moves"] == Counter(hop["move"] for row in rows for hop in row["hops"])
    assert totals["moves"]["operator"] == 1
    assert set(totals["prefilled"]) == {"i0", "i1"}
    assert {row["kind"] for row in rows} == {"chat", "completion"}
    assert f"good {totals['good']} of 16" in " ".join(run.stdout.split())
    # Every move took its KV along: nothing but the prompt of a moved request can have been moved.
    moved = sum(hop["kv_tokens"] for row in rows for hop in row["hops"])
    assert moved * 1024 == totals["moved_bytes"]
    assert [path.name for path in scratch.iterdir()] == ["demo.json"]
    assert not processes_of(scratch)


@pytest.mark.parametrize("moment", ["model    ", "server   ready", "by hand", "page     "])
def test_ctrl_c_leaves_nothing_behind(scratch: Path, moment: str) -> None:
    log = scratch / "out"
    words = [*DEMO, "--page"] if moment == "page     " else DEMO
    with log.open("wb") as out:
        demo = subprocess.Popen(
            words, env=environment(scratch), stdout=out, stderr=subprocess.STDOUT, process_group=0
        )
    until = time.monotonic() + 400
    while moment not in log.read_text() and demo.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(3 if moment == "model    " else 0)  # into the start of the server
    os.killpg(demo.pid, signal.SIGINT)
    assert demo.wait(60) == 130, log.read_text()
    assert log.read_text().splitlines()[-1] == "demo: stopped; nothing is left running"
    assert "Traceback" not in log.read_text()
    assert [path.name for path in scratch.iterdir()] == ["out"]
    assert not processes_of(scratch)
