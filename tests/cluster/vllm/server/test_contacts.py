"""A connection over TCP that is really reset and made anew is known before any word comes over it."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("zmq")

import zmq

from taichi_serve.cluster.vllm.curve import as_client, as_server, both, new_pair
from taichi_serve.cluster.vllm.server.contacts import Contacts
from taichi_serve.ports import port_of, reserve

SOON = 5_000  # milliseconds


class Relay:
    """Stands between two ends of connections, and resets them when it is told to."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listens = socket.create_server(("127.0.0.1", 0))
        self.port = port_of(self._listens)
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listens.accept()
            except OSError:
                return
            self.pairs.append((near, socket.create_connection(("127.0.0.1", self._to))))
            threading.Thread(target=self._carry, args=self.pairs[-1], daemon=True).start()

    def _carry(self, *pair: socket.socket) -> None:
        try:
            while True:
                for one in select.select(pair, [], [])[0]:
                    pair[pair[0] is one].sendall(one.recv(1 << 16))
        except (OSError, ValueError):
            pass

    def reset(self) -> None:
        """As a firewall does that forgot the connection: both ends get a RST."""
        for one in self.pairs.pop():
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.shutdown(socket.SHUT_RD)
            one.close()

    def close(self) -> None:
        self._listens.close()
        while self.pairs:
            self.reset()


class Wire:
    """The server's end of an engine's outputs, the engine's, and a relay between them."""

    def __init__(self) -> None:
        own, theirs = new_pair(), new_pair()
        self.here, self.there, self.contacts = zmq.Context(), zmq.Context(), Contacts()
        with reserve() as reserved:
            port = port_of(reserved)
            self.server = self.here.socket(zmq.PULL)
            both(as_server(own, [theirs.public]), self.contacts.watch)(self.here, self.server)
            self.server.bind(f"tcp://127.0.0.1:{port}")
        self.port, self.relay = port, Relay(port)
        self.engine = self.there.socket(zmq.PUSH)
        as_client(theirs, own.public)(self.there, self.engine)
        self.engine.connect(f"tcp://127.0.0.1:{self.relay.port}")

    def brings(self, word: bytes) -> bool:
        self.engine.send(word)
        return bool(self.server.poll(SOON)) and self.server.recv() == word

    def close(self) -> None:
        self.relay.close()
        self.contacts.close()
        self.there.destroy(linger=0)
        self.here.destroy(linger=0)


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def test_one_connection_is_none_that_was_made_anew(wire: Wire) -> None:
    assert not wire.contacts.again
    assert wire.brings(b"a token")
    assert wire.brings(b"another one")
    assert not wire.contacts.again


def test_who_takes_the_first_word_after_a_reset_knows_of_it(wire: Wire) -> None:
    assert wire.brings(b"a token")
    wire.relay.reset()
    for number in range(1000):  # whatever is on its way is lost, until one comes
        wire.engine.send(b"%d" % number)
        if wire.server.poll(5):
            break
    assert wire.server.recv()
    assert wire.contacts.again
    assert wire.contacts.again


def test_strangers_who_come_and_go_are_no_connections(wire: Wire) -> None:
    assert wire.brings(b"a token")
    greeting = b"\xff" + bytes(7) + b"\x01\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", greeting + b"\x04\xc8\x05HELLO\x01\x00" + bytes(192)):
        stranger = socket.create_connection(("127.0.0.1", wire.port))
        with stranger, contextlib.suppress(OSError):  # it is shown out
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    assert wire.brings(b"another one")
    assert not wire.contacts.again


def test_where_nothing_is_watched_nothing_is_known_and_nothing_asked() -> None:
    contacts = Contacts()
    assert not contacts.again
    contacts.close()
