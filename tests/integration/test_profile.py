"""`taichi profile` as its user runs it: two real engines, an interruption, and what is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import ENVIRONMENT, KV_BYTES, eventually

from taichi_serve.latency.identity import Identity
from taichi_serve.latency.profile import load
from taichi_serve.profiling.draft import Draft
from taichi_serve.sliders import Kind
from taichi_serve.tiny import cached_tiny_model

PROFILE = (sys.executable, "-m", "taichi_serve.cli", "profile")
GRID = (
    *("--grid-chunks", "32,128,512", "--grid-decodes", "0,2,8", "--grid-contexts", "128,1024"),
    *("--grid-moves", "128,1024", "--grid-repeats", "3"),
)
ENGINE = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"),
    *("--kv-cache-memory-bytes", str(KV_BYTES)),
)
CELLS = 3 * 5  # chunks; no decodes, and two numbers of them with two contexts each


def left(scratch: Path) -> list[Path]:
    """What is there, but for what PyTorch compiled: it keeps that for the next process."""
    return sorted(path for path in scratch.glob("*") if not path.name.startswith("torchinductor_"))


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path: sockets lie in it, and their names may not be long."""
    return tmp_path_factory.mktemp("p")


def start(scratch: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROFILE, *words, "-o", str(scratch / "p.json")],
        env={**os.environ, **ENVIRONMENT, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def interrupted(scratch: Path) -> Path:
    """A directory with the draft of a run that got SIGINT after its second cell."""
    run = start(scratch, str(cached_tiny_model()), *ENGINE, *GRID)
    part = scratch / "p.json.part"
    try:
        eventually(
            lambda: (part.exists() and part.read_bytes().count(b"\n") > 2) or run.poll() is not None,
            200,
            "two cells are measured",
        )
        run.send_signal(signal.SIGINT)
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, said
    assert f"the same command goes on from {part}" in said
    assert left(scratch) == [part], "no directory of an engine is left"
    return scratch


def test_the_tiny_model_is_measured_from_where_it_was_interrupted(interrupted: Path) -> None:
    part = interrupted / "p.json.part"
    head, *cells = part.read_bytes().splitlines(keepends=True)
    before = cells[:2]
    part.write_bytes(head + b"".join(3 * before))  # as if all three rounds had said the same of them
    run = start(interrupted, str(cached_tiny_model()), *ENGINE, *GRID)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert "held-out error" in said
    assert left(interrupted) == [interrupted / "p.json"]

    profile = load(interrupted / "p.json")
    assert profile.model == cached_tiny_model().name
    assert profile.bytes_per_token == 2048
    assert profile.kv_capacity == KV_BYTES // 2048 - 128  # one block is vLLM's own
    assert (profile.settings["dtype"], profile.settings["max_model_len"]) == ("float32", 4096)
    assert len(profile.steps) == CELLS * 4 + (CELLS - 3)
    rows = {tuple(row) for line in before for row in _rows(line)}
    assert rows <= {(r.prefill_tokens, r.attention, r.decodes, r.kv_tokens, r.seconds) for r in profile.steps}
    assert {(t.source, t.target) for t in profile.transfers} == {(a, b) for a in Kind for b in Kind}
    # A longer chunk takes longer, whatever else the machine does; the error is for an idle one to judge.
    alone = {r.prefill_tokens: r.seconds for r in profile.steps if r.decodes == 0}
    assert alone[32] < alone[128] < alone[512]


def _rows(line: bytes) -> list[list[float]]:
    rows: list[list[float]] = json.loads(line)["rows"]
    return rows


def test_a_missing_model_is_one_clear_line(scratch: Path) -> None:
    run = start(scratch, "/nowhere/at/all")
    said, _ = run.communicate(timeout=100)
    assert run.returncode == 1
    assert said.strip().splitlines()[-1] == "taichi profile: /nowhere/at/all: no such directory"
    assert "Traceback" not in said


def test_a_draft_of_another_setting_is_one_clear_line(scratch: Path) -> None:
    other = Identity("tiny", "elsewhere", 4096, {}, {})
    draft = Draft(scratch / "p.json.part", other)
    with draft.path.open("a") as file:
        file.write("{}\n")
    run = start(scratch, str(cached_tiny_model()), *ENGINE, *GRID)
    said, _ = run.communicate(timeout=100)
    assert run.returncode == 2
    assert said.strip().splitlines()[-1].endswith("remove it to begin anew")
    assert left(scratch) == [draft.path]


def test_an_instance_is_measured_beside_another_that_is_at_work(scratch: Path) -> None:
    few = (
        "--grid-chunks",
        "32,128",
        "--grid-decodes",
        "0,2",
        "--grid-contexts",
        "128",
        "--grid-repeats",
        "1",
    )
    run = start(scratch, str(cached_tiny_model()), *ENGINE, *few, "--neighbours", "1", "--no-moves")
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert " beside 1 at work, " in said
    profile = load(scratch / "p.json")
    assert profile.settings["neighbours"] == 1
    assert {(row.prefill_tokens, row.decodes) for row in profile.steps} == {
        (32, 0), (128, 0), (32, 2), (128, 2), (0, 2),
    }  # fmt: skip
    assert profile.transfers == []
    assert left(scratch) == [scratch / "p.json"]
