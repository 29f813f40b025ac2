"""Sockets between hosts take whoever has the key, and say nothing to anybody else."""

from __future__ import annotations

import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("zmq")

import zmq

from taichi_serve.cluster.vllm.curve import (
    Dress,
    Keys,
    Pair,
    as_client,
    as_server,
    keys_file,
    mesh,
    new_pair,
    read_keys,
    through,
    write_keys,
    write_private,
)

SOON = 2_000  # milliseconds in which what gets through gets through
NEVER = 300  # and after which what has not come will not come
GREETING = 64  # bytes that every ZeroMQ socket says first


class Sockets:
    """Of two contexts, as if of two processes."""

    def __init__(self) -> None:
        self.here, self.there = zmq.Context(), zmq.Context()
        self._open: list[Any] = []

    def listen(self, dress: Dress, kind: int = zmq.ROUTER) -> tuple[Any, str]:
        made = self.here.socket(kind)
        self._open.append(made)
        dress(self.here, made)
        port = made.bind_to_random_port("tcp://127.0.0.1")
        return made, f"tcp://127.0.0.1:{port}"

    def connect(self, endpoint: str, dress: Dress | None, kind: int = zmq.DEALER) -> Any:
        made = self.there.socket(kind)
        self._open.append(made)
        if dress is not None:
            dress(self.there, made)
        made.connect(endpoint)
        return made

    def close(self) -> None:
        self.there.destroy(linger=0)
        self.here.destroy(linger=0)


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    made = Sockets()
    yield made
    made.close()


def test_who_has_the_key_is_heard_and_answered(sockets: Sockets) -> None:
    server, engine = new_pair(), new_pair()
    router, endpoint = sockets.listen(as_server(server, [engine.public]))
    dealer = sockets.connect(endpoint, as_client(engine, server.public))
    dealer.send(b"hello")
    assert router.poll(SOON)
    name, word = router.recv_multipart()
    assert word == b"hello"
    router.send_multipart([name, b"welcome"])
    assert dealer.poll(SOON)
    assert dealer.recv() == b"welcome"


def test_a_key_of_somebody_else_gets_nobody_in_even_with_the_servers_public_key(sockets: Sockets) -> None:
    server, engine, stranger = new_pair(), new_pair(), new_pair()
    router, endpoint = sockets.listen(as_server(server, [engine.public]))
    sockets.connect(endpoint, as_client(stranger, server.public)).send(b"hello")
    assert not router.poll(NEVER)


def test_who_speaks_without_a_key_is_not_heard(sockets: Sockets) -> None:
    server, engine = new_pair(), new_pair()
    router, endpoint = sockets.listen(as_server(server, [engine.public]))
    sockets.connect(endpoint, None).send(b"hello")
    assert not router.poll(NEVER)


@pytest.mark.parametrize(
    "bytes_",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00" * 4096,
        b"\xff" + b"\x00" * 8 + b"\x7f\x03\x01CURVE" + b"\xff" * 2048,
    ],
    ids=["nothing", "http", "zeros", "half a greeting"],
)
def test_hostile_bytes_get_a_greeting_at_most_and_leave_the_others_alone(
    sockets: Sockets, bytes_: bytes
) -> None:
    server, engine = new_pair(), new_pair()
    router, endpoint = sockets.listen(as_server(server, [engine.public]))
    dealer = sockets.connect(endpoint, as_client(engine, server.public))
    host, port = endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=NEVER / 1e3) as stranger:
        stranger.sendall(bytes_)
        got = b""
        try:
            while part := stranger.recv(4096):
                got += part
        except OSError:  # it is closed, or nothing more is said
            pass
    assert len(got) <= GREETING
    dealer.send(b"hello")
    assert router.poll(SOON)


def test_a_pipe_takes_one_peer_who_may_come_after_a_stranger(sockets: Sockets) -> None:
    server, engine, stranger = new_pair(), new_pair(), new_pair()
    line, endpoint = sockets.listen(as_server(server, [engine.public]), zmq.DEALER)
    wrong = sockets.connect(endpoint, as_client(stranger, server.public))
    assert not line.poll(NEVER, zmq.POLLOUT)
    right = sockets.connect(endpoint, as_client(engine, server.public))
    assert line.poll(SOON, zmq.POLLOUT)
    line.send(b"an order")
    assert right.poll(SOON)
    assert not wrong.poll(0)
    assert right.recv() == b"an order"


def test_engines_ask_each_other_with_one_key_that_nobody_else_has(sockets: Sockets) -> None:
    ours, stranger = new_pair(), new_pair()
    router, endpoint = sockets.listen(mesh(ours))
    sockets.connect(endpoint, as_client(stranger, ours.public), zmq.REQ).send(b"who are you?")
    assert not router.poll(NEVER)
    sockets.connect(endpoint, mesh(ours), zmq.REQ).send(b"who are you?")
    assert router.poll(SOON)


def test_two_sockets_of_a_context_share_one_who_answers_for_keys(sockets: Sockets) -> None:
    server, engine = new_pair(), new_pair()
    dress = as_server(server, [engine.public])
    for kind in (zmq.ROUTER, zmq.PULL):
        listening, endpoint = sockets.listen(dress, kind)
        speaking = sockets.connect(
            endpoint, as_client(engine, server.public), zmq.PUSH if kind == zmq.PULL else zmq.DEALER
        )
        speaking.send(b"hello")
        assert listening.poll(SOON)


def test_keys_are_in_a_file_that_only_its_user_reads(tmp_path: Path) -> None:
    keys = Keys("server", Pair("public", "secret"), new_pair(), ["tcp://10.0.0.1:5000"])
    write_keys(tmp_path, "run-i0", keys)
    assert stat.S_IMODE(keys_file(tmp_path, "run-i0").stat().st_mode) == 0o600
    assert read_keys(tmp_path, "run-i0") == keys
    assert read_keys(tmp_path, "run-i1") is None


def test_a_private_file_is_never_written_over_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError):
        write_private(tmp_path / "there", b"secret")


def test_sockets_that_a_module_makes_are_dressed_before_they_are_bound() -> None:
    done: list[str] = []

    class Made:
        def bind(self, path: str) -> None:
            done.append(f"bound {path}")

    def make_zmq_socket(ctx: Any, path: str, kind: int, **options: Any) -> Any:
        made = ctx.socket(kind)
        made.bind(path)
        return made

    module: Any = ModuleType("a module")
    module.make_zmq_socket = make_zmq_socket
    context: Any = SimpleNamespace(socket=lambda kind: Made())
    for _ in range(2):  # twice is once
        through(module, lambda path: (lambda ctx, made: done.append("dressed")) if path == "tcp" else None)
    module.make_zmq_socket(context, "tcp", 0)
    module.make_zmq_socket(context, "ipc", 0)
    assert done == ["dressed", "bound tcp", "bound ipc"]
