"""A holder runs a process on its host, tells what it writes and how it ends, and leaves nothing of it."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

pytest.importorskip("zmq")

from taichi_serve.cluster.vllm.curve import Keys, new_pair
from taichi_serve.cluster.vllm.hosts.holder import Begun, Holder, Order, Said
from taichi_serve.cluster.vllm.spec import Spec
from taichi_serve.cluster.vllm.wire import flight_file

ENGINE_ID = "taichi-abc-i0"
CORE = """
import os, sys, time
print("it loads", flush=True)
open(os.environ["BEGAN"], "w").close()
while not os.path.exists(os.environ["END"]): time.sleep(0.01)
print("RuntimeError: it cannot", flush=True)
sys.exit(3)
"""


class Program(subprocess.Popen[bytes]):
    """In the place of an engine core."""

    def __init__(self, spec: Path, log: Path, env: Mapping[str, str]) -> None:
        with log.open("wb") as output:
            super().__init__(
                [sys.executable, "-c", CORE], env=dict(env), stdout=output, stderr=output, process_group=0
            )

    def kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        pass


class Held:
    """A holder on the node `node-1`, and what it was told to hold."""

    def __init__(self, directory: Path) -> None:
        self.began, self.end = directory / "began", directory / "end"
        self.keys = Keys("server", new_pair(), new_pair(), [])
        program: Any = Program
        self.holder = Holder("127.0.0.1", "node-1234567890", program)
        env = {"BEGAN": str(self.began), "END": str(self.end)}
        order = Order("taichi-abc", "i0", ENGINE_ID, "tcp://10.0.0.1:1", ["some/model"], env, self.keys)
        self.begun = msgspec.msgpack.decode(self.holder.begin(msgspec.msgpack.encode(order)), type=Begun)
        self.directory = directory / "taichi-abc-node-1234567"
        self.at = 0

    def said(self) -> Said:
        said = msgspec.msgpack.decode(self.holder.follow(self.at), type=Said)
        self.at += len(said.words)
        return said


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = Held(tmp_path)
    yield made
    made.holder.end()


def test_it_runs_with_its_spec_in_a_directory_that_is_its_users_alone(held: Held) -> None:
    assert psutil.pid_exists(held.begun.pid)
    assert held.begun.host == "127.0.0.1"
    assert stat.S_IMODE(held.directory.stat().st_mode) == 0o700
    spec = msgspec.json.decode((held.directory / "i0.json").read_bytes(), type=Spec)
    assert spec == Spec(["some/model"], ENGINE_ID, "tcp://10.0.0.1:1", os.getpid(), shared=True)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in held.directory.glob("*.*")}
    assert modes["i0.json"] == modes[f"{ENGINE_ID}.keys"] == 0o600


def test_what_it_writes_is_told_and_then_how_it_ended_and_whose_prompts_it_computed(held: Held) -> None:
    assert held.said() == Said(b"it loads\n")
    flight_file(held.directory, ENGINE_ID).write_bytes(b"a flight")
    held.end.touch()
    words, last = b"", Said(b"")
    while last.code is None:
        last = held.said()
        words += last.words
    assert (words, last.code, last.flight) == (b"RuntimeError: it cannot\n", 3, b"a flight")


def test_who_has_nothing_to_say_says_so_within_a_second_or_so(held: Held) -> None:
    held.said()
    began = time.monotonic()
    assert held.said() == Said(b"")
    assert time.monotonic() - began < 5


def test_nothing_of_it_is_left(held: Held) -> None:
    assert held.holder.end()
    assert not psutil.pid_exists(held.begun.pid)
    assert not held.directory.exists()


def test_a_socket_whose_owner_is_slow_to_end_goes_with_the_directory(held: Held) -> None:
    (held.directory / "0a1b2c3d-0000-4000-8000-0123456789ab").touch()
    held.holder.end()
    assert not held.directory.exists()


def test_what_a_start_that_failed_left_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def begin(path: Path, log: Path, env: Mapping[str, str]) -> Any:
        raise OSError("no more processes")

    holder = Holder("127.0.0.1", "node-1234567890", begin)
    keys = Keys("server", new_pair(), new_pair(), [])
    order = Order("taichi-abc", "i0", ENGINE_ID, "tcp://10.0.0.1:1", ["some/model"], {}, keys)
    with pytest.raises(OSError, match="no more processes"):
        holder.begin(msgspec.msgpack.encode(order))
    assert holder.end()
    assert list(tmp_path.iterdir()) == []


def test_what_others_of_the_server_have_on_the_node_stays(held: Held) -> None:
    (held.directory / "taichi-abc-i1.keys").touch()
    held.holder.end()
    assert [path.name for path in held.directory.iterdir()] == ["taichi-abc-i1.keys"]


def test_a_directory_that_somebody_else_can_enter_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "taichi-abc-node-1234567").mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="not ours alone"):
        Held(tmp_path)
