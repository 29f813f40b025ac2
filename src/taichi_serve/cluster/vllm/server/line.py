"""What one incarnation of an instance is spoken to on: files in the server's directory, or ports of the
cluster's interface with keys of their own."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from taichi_serve.cluster.vllm.curve import Dress, Keys, Pair, as_server, both, new_pair
from taichi_serve.cluster.vllm.server.contacts import Contacts
from taichi_serve.cluster.vllm.wire import copier_endpoint
from taichi_serve.ports import LOOPBACK, port_of, reserve

# How vLLM's ends of sockets are dressed, by their endpoints. Whoever has a line puts them here.
DRESSES: dict[str, Dress] = {}


@dataclass
class Line:
    """The endpoints of one incarnation, and what they are closed with."""

    handshake: str
    inputs: str
    outputs: str
    copiers: list[str]  # by rank
    host: str = LOOPBACK  # where its process listens for peers, if it is on the server's host
    keys: Keys | None = None  # for the process; None: its sockets are files
    contacts: Contacts = field(default_factory=Contacts)  # over ports alone
    _dress: Dress | None = None
    _reserved: list[socket.socket] = field(default_factory=list)

    def listen(
        self, context: zmq.Context[Any], kind: int, endpoint: str, watched: bool = False
    ) -> zmq.Socket[Any]:
        """A socket of the server's at one of them; it is `watched` for connections that are made anew."""
        made = context.socket(kind)
        made.linger = 0
        if self._dress is not None:
            self._dress(context, made)
        if watched:
            self.contacts.watch(context, made)
        made.bind(endpoint)
        return made

    def copier(self, context: zmq.Context[Any], rank: int) -> zmq.Socket[Any]:
        """The server's end of a copier's. Over a file the copier listens, over a port the server does."""
        if self._dress is not None:
            return self.listen(context, zmq.DEALER, self.copiers[rank], watched=True)
        made = context.socket(zmq.PAIR)
        made.linger = 0
        made.connect(self.copiers[rank])
        return made

    def close(self) -> None:
        """Its ports may be anybody's."""
        self.contacts.close()
        for endpoint in (self.inputs, self.outputs):
            DRESSES.pop(endpoint, None)
        for reserved in self._reserved:
            reserved.close()


MakeLine = Callable[[Path, str, int], Line]  # of a directory, a name, and the number of ranks


def engine_id(directory: Path, name: str) -> str:
    """Of this incarnation alone, of all servers."""
    return f"{directory.name}-{name}"


def over_files(directory: Path, name: str, ranks: int = 1) -> Line:
    """In a directory that only the server's user can enter."""
    handshake, inputs, outputs = (f"ipc://{directory}/{name}.{end}" for end in ("start", "in", "out"))
    copiers = [copier_endpoint(directory, engine_id(directory, name), rank) for rank in range(ranks)]
    return Line(handshake, inputs, outputs, copiers)


class Wires:
    """Lines over TCP at one address of this host, with keys made for this run."""

    def __init__(self, host: str, mesh: Pair | None = None) -> None:
        """With the key of engines that are there already, if there are any. Raises OSError where this host
        does not have the address."""
        reserve(host).close()
        self.host = host
        self._own, self._mesh = new_pair(), mesh or new_pair()

    def __call__(self, directory: Path, name: str, ranks: int = 1) -> Line:
        """One that takes nobody but who has the key that is made for it now."""
        reserved = [reserve(self.host) for _ in range(3 + ranks)]
        handshake, inputs, outputs, *copiers = (f"tcp://{self.host}:{port_of(one)}" for one in reserved)
        theirs = new_pair()
        keys = Keys(self._own.public, theirs, self._mesh, copiers, inputs, outputs)
        dress, contacts = as_server(self._own, [theirs.public]), Contacts()
        DRESSES[inputs] = DRESSES[outputs] = both(dress, contacts.watch)
        return Line(handshake, inputs, outputs, copiers, self.host, keys, contacts, dress, reserved)
