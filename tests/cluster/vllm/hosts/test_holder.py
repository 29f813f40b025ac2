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

from taichi_serve.cluster.vllm.belongings import remove_with_the_last
from taichi_serve.cluster.vllm.curve import Keys, new_pair, read_keys, write_private
from taichi_serve.cluster.vllm.hosts import holder as module
from taichi_serve.cluster.vllm.hosts.holder import ALONE_SECONDS, Holder
from taichi_serve.cluster.vllm.hosts.words import FREE_SECONDS, LATER, Begun, Offer, Order, Said
from taichi_serve.cluster.vllm.spec import SIGNAL, Spec
from taichi_serve.cluster.vllm.wire import flight_file

SERVER, NEXT = "taichi-abc", "taichi-def"
ENGINE_ID = "taichi-abc-i0"
CORE = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: print("it is told", flush=True))
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
        self.now = 1000.0
        self.holder = Holder("127.0.0.1", "node-1234567890", program, lambda: self.now)
        env = {"BEGAN": str(self.began), "END": str(self.end)}
        order = Order(
            SERVER, "taichi-abc", "i0", ENGINE_ID, "tcp://10.0.0.1:1", ["some/model"], env, self.keys
        )
        self.begun = msgspec.msgpack.decode(self.holder.begin(msgspec.msgpack.encode(order)), type=Begun)
        self.directory = directory / "taichi-abc-node-1234567"
        self.at = 0

    def offered(self, server: str = NEXT) -> Offer | None:
        offer = self.holder.offer(server)
        return msgspec.msgpack.decode(offer, type=Offer) if offer else None

    def said(self) -> Said:
        said = msgspec.msgpack.decode(self.holder.follow(SERVER, self.at), type=Said)
        self.at += len(said.words)
        return said


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = Held(tmp_path)
    yield made
    made.holder.clear()


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
    assert held.holder.end(SERVER)
    assert not psutil.pid_exists(held.begun.pid)
    assert not held.directory.exists()


def test_a_socket_whose_owner_is_slow_to_end_goes_with_the_directory(held: Held) -> None:
    (held.directory / "0a1b2c3d-0000-4000-8000-0123456789ab").touch()
    held.holder.end(SERVER)
    assert not held.directory.exists()


def test_what_a_start_that_failed_left_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def begin(path: Path, log: Path, env: Mapping[str, str]) -> Any:
        raise OSError("no more processes")

    holder = Holder("127.0.0.1", "node-1234567890", begin)
    keys = Keys("server", new_pair(), new_pair(), [])
    order = Order(SERVER, "taichi-abc", "i0", ENGINE_ID, "tcp://10.0.0.1:1", ["some/model"], {}, keys)
    with pytest.raises(OSError, match="no more processes"):
        holder.begin(msgspec.msgpack.encode(order))
    assert holder.end(SERVER)
    assert list(tmp_path.iterdir()) == []


def test_what_others_of_the_server_have_on_the_node_stays(held: Held) -> None:
    (held.directory / "taichi-abc-i1.keys").touch()
    held.holder.end(SERVER)
    assert [path.name for path in held.directory.iterdir()] == ["taichi-abc-i1.keys"]


def test_a_directory_that_is_taken_away_just_then_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By who held the last engine in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    once = ["taken away"]

    def write(path: Path, data: bytes) -> None:
        if once:
            once.pop()
            remove_with_the_last(path.parent)
        write_private(path, data)

    monkeypatch.setattr(module, "write_private", write)
    held = Held(tmp_path)
    assert (held.directory / "i0.json").exists()
    held.holder.clear()


def test_a_directory_that_somebody_else_can_enter_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "taichi-abc-node-1234567").mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="not ours alone"):
        Held(tmp_path)


def test_an_engine_that_serves_is_the_next_servers_once_its_own_has_said_nothing_for_a_while(
    held: Held,
) -> None:
    held.holder.keep(SERVER, 120.0)
    held.now += FREE_SECONDS - 1
    assert held.holder.offer(NEXT) == LATER  # its server may live
    held.now += 2
    assert held.offered() == Offer("taichi-abc", "i0", ENGINE_ID, held.keys.mesh, held.begun)
    assert held.holder.offer("taichi-ghi") == LATER  # it is the first one's that asked


def test_one_that_does_not_serve_yet_or_is_not_to_be_kept_is_nobodys(held: Held) -> None:
    held.now += FREE_SECONDS + 1
    assert held.offered() is None
    held.holder.keep(SERVER, 0.0)
    held.now += FREE_SECONDS + 1
    assert held.offered() is None


def test_one_that_has_ended_is_not_offered(held: Held) -> None:
    held.holder.keep(SERVER, 120.0)
    held.end.touch()
    while held.said().code is None:
        pass
    held.now += FREE_SECONDS + 1
    assert held.offered() is None


def test_a_server_that_comes_back_after_another_one_took_its_engine_can_do_nothing_to_it(held: Held) -> None:
    held.holder.keep(SERVER, 120.0)
    held.now += FREE_SECONDS + 1
    assert held.offered() is not None
    for call in (
        lambda: held.holder.follow(SERVER, 0),
        lambda: held.holder.signal(SERVER, 15),
        lambda: held.holder.kill(SERVER),
        lambda: held.holder.end(SERVER),
        lambda: held.holder.keep(SERVER, 1.0),
    ):
        with pytest.raises(PermissionError, match="another server has taken it over"):
            call()
    assert psutil.Process(held.begun.pid).status() != psutil.STATUS_ZOMBIE


def test_the_engine_is_told_of_its_next_server_and_reads_where_that_listens(held: Held) -> None:
    held.said()
    held.holder.keep(SERVER, 120.0)
    held.now += FREE_SECONDS + 1
    held.offered()
    keys = Keys("next", new_pair(), held.keys.mesh, ["tcp://1"], "tcp://2", "tcp://3")
    begun = held.holder.again(NEXT, msgspec.msgpack.encode(keys))
    assert msgspec.msgpack.decode(begun, type=Begun) == held.begun
    assert read_keys(held.directory, ENGINE_ID) == keys
    (path,) = held.directory.glob("*.keys*")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    said = msgspec.msgpack.decode(held.holder.follow(NEXT, held.at), type=Said)
    assert (said.words, SIGNAL) == (b"it is told\n", signal.SIGUSR1)


def test_one_that_is_not_to_be_kept_is_forsaken_soon_and_one_that_is_when_its_time_is_over(
    held: Held,
) -> None:
    assert not held.holder.forsaken()
    held.now += ALONE_SECONDS - 1
    assert not held.holder.forsaken()
    held.holder.keep(SERVER, 120.0)
    held.now += 119
    assert not held.holder.forsaken()
    held.now += 2
    assert held.holder.forsaken()
    assert held.offered() is None
    with pytest.raises(PermissionError):
        held.holder.follow(SERVER, 0)


def test_a_holder_that_was_never_told_to_begin_is_forsaken_too() -> None:
    now = [0.0]
    holder = Holder("127.0.0.1", "node", clock=lambda: now[0])
    now[0] = ALONE_SECONDS + 1
    assert holder.forsaken()
    assert holder.clear()
