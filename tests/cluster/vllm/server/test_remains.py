"""What a dead process leaves behind: its own files and processes, and nobody else's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.belongings import members
from taichi_serve.cluster.vllm.server.remains import (
    ending,
    exit_code,
    forget_logs,
    lives,
    remove_files,
    wait_gone,
)
from taichi_serve.cluster.vllm.wire import copier_endpoint, direct_marker, flight_file, offer_file


def files(directory: Path, name: str) -> set[Path]:
    """The files that come with one incarnation, a peer i9 among them."""
    engine = f"server-{name}"
    copier = Path(copier_endpoint(directory, engine, 0).removeprefix("ipc://"))
    made = {directory / f"{name}.{kind}" for kind in ("json", "start", "in", "out")}
    made |= {copier, flight_file(directory, engine), offer_file(directory, f"agent-{name}")}
    made |= {
        direct_marker(directory, engine, "server-i9", 0),
        direct_marker(directory, "server-i9", engine, 0),
    }
    for path in made:
        path.write_text(json.dumps({"engine_id": engine}))
    (directory / name).mkdir()
    (directory / name / "socket").touch()
    (directory / f"{name}.log").touch()
    return made


def test_the_files_of_one_incarnation_go_and_those_of_all_others_stay(tmp_path: Path) -> None:
    gone = files(tmp_path, "i1")
    others = {path for name in ("i1.2", "i10", "i11", "i0") for path in files(tmp_path, name)}
    remove_files(tmp_path, "i1", "server-i1")
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in others)
    assert not (tmp_path / "i1").exists()
    assert (tmp_path / "i1.2" / "socket").exists()
    assert (tmp_path / "i1.log").exists()


def test_sockets_of_vllm_go_when_nobody_listens_on_them_any_more(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket may not be long
    names = [str(uuid4()) for _ in range(2)]
    sockets = [socket.socket(socket.AF_UNIX) for _ in names]
    with sockets[0], sockets[1]:
        for name, listener in zip(names, sockets, strict=True):
            listener.bind(name)
        sockets[0].close()
        remove_files(Path(), "i1", "server-i1")
        assert [Path(name).exists() for name in names] == [False, True]


def test_offers_that_cannot_be_read_are_left(tmp_path: Path) -> None:
    for name, text in (("kv-a.json", "not json"), ("kv-b.json", "{}"), ("kv-c.json", "[]")):
        (tmp_path / name).write_text(text)
    remove_files(tmp_path, "i1", "server-i1")
    assert len(list(tmp_path.iterdir())) == 3


def test_the_first_log_of_an_instance_and_the_last_ones_are_kept(tmp_path: Path) -> None:
    for name in ("i1", "i10", "i10.2", *(f"i1.{turn}" for turn in range(2, 13))):
        (tmp_path / f"{name}.log").touch()
    forget_logs(tmp_path, "i1")
    left = {path.stem for path in tmp_path.iterdir()}
    assert left == {"i1", "i1.8", "i1.9", "i1.10", "i1.11", "i1.12", "i10", "i10.2"}


def test_a_group_is_gone_when_its_last_process_has_ended() -> None:
    child = (
        "import subprocess, sys; subprocess.Popen(['sleep', '60']); sys.stdout.write('x'); sys.stdout.flush()"
    )
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, process_group=0)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"x"
    process.wait()
    (left,) = members(process.pid)
    assert not wait_gone(process.pid, 0.1)
    subprocess.run(["kill", "-9", str(left)], check=True)
    assert wait_gone(process.pid, 10)
    process.stdout.close()


def test_an_end_is_told_in_words() -> None:
    assert [ending(code) for code in (0, 3, -9, None)] == [
        "exit code 0", "exit code 3", "killed by SIGKILL", "it still runs",
    ]  # fmt: skip


def test_a_server_that_orphans_come_to_has_no_dead_child_left() -> None:
    text = """
import ctypes, os, subprocess, sys
from taichi_serve.cluster.vllm.belongings import members
from taichi_serve.cluster.vllm.server.remains import reap, wait_gone
assert ctypes.CDLL(None).prctl(36, 1) == 0  # PR_SET_CHILD_SUBREAPER: as the first process of a container
sleep = "import os, subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); os.read(1, 1)"
other = subprocess.Popen(["sleep", "600"])
leader = subprocess.Popen([sys.executable, "-c", sleep], process_group=0, stdout=subprocess.PIPE)
orphan = int(leader.stdout.readline())
os.killpg(leader.pid, 9)
leader.wait()
assert wait_gone(leader.pid, 20)
assert os.path.exists(f"/proc/{orphan}"), "a dead child"
reap(leader.pid)
assert not os.path.exists(f"/proc/{orphan}")
reap(leader.pid)
assert other.poll() is None
other.kill()
"""
    subprocess.run([sys.executable, "-c", text], check=True)


def test_how_one_ended_is_known_as_long_as_nobody_has_asked() -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert exit_code(child.pid) == 7
        assert not lives(child.pid)
        child.wait()
        assert exit_code(child.pid) == -9, "nobody can tell"
    assert lives(os.getpid())
