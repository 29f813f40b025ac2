"""ZeroMQ sockets between hosts: encrypted, and closed to everybody whose key is not known (CURVE).

Keys are made for one run of a server, live in memory and in files that only their user can read, and are told
to engine processes in such a file (`Keys`): never on a command line, nor in an environment. A socket that
listens takes peers with certain keys only; to everybody else it says ZeroMQ's greeting (64 bytes that are the
same everywhere) and nothing more, whatever they send.

vLLM makes its own ends of these sockets by one function, which three of its modules know by name. `through`
puts ours in its place there (contract: tests/contract): the socket is dressed before it is bound.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import zmq
from zmq.utils import z85

DOMAIN = b"taichi"  # of authentication; without one ZeroMQ lets everybody in where nobody answers for a key
DOOR = "inproc://zeromq.zap.01"  # where ZeroMQ asks about a key (RFC 27)
HANDSHAKE_MS = 5_000  # that a stranger may hold a connection open without a key

Socket: TypeAlias = zmq.Socket[Any]
Dress: TypeAlias = Callable[[zmq.Context[Any], Socket], None]


class Pair(msgspec.Struct, frozen=True):
    """A key, in ZeroMQ's text form of 40 characters."""

    public: str
    secret: str


def new_pair() -> Pair:
    """A key that nobody has yet."""
    public, secret = zmq.curve_keypair()
    return Pair(public.decode(), secret.decode())


class Keys(msgspec.Struct, frozen=True):
    """What one engine process speaks with over TCP."""

    server: str  # the server's public key
    own: Pair  # which the server takes from this process only
    mesh: Pair  # of all engines of the server: they speak to each other with it
    copiers: list[str]  # where the server listens for the copier of each rank
    inputs: str = ""  # and for the core, if it is told so at a handshake no more (core/again.py)
    outputs: str = ""


# -------------------------------------------------------------------------------------------------- its file


def keys_file(directory: Path, engine_id: str) -> Path:
    """Where the processes of one engine find them."""
    return directory / f"{engine_id}.keys"


def write_keys(directory: Path, engine_id: str, keys: Keys) -> None:
    """Leave them for one engine."""
    write_private(keys_file(directory, engine_id), msgspec.json.encode(keys))


def replace_keys(directory: Path, engine_id: str, keys: Keys) -> None:
    """Leave other ones for an engine that runs."""
    path = keys_file(directory, engine_id)
    new = path.with_suffix(".keys-new")
    new.unlink(missing_ok=True)
    write_private(new, msgspec.json.encode(keys))
    new.replace(path)


def read_keys(directory: Path, engine_id: str) -> Keys | None:
    """Those of an engine; None where its sockets are files, and need none."""
    try:
        return msgspec.json.decode(keys_file(directory, engine_id).read_bytes(), type=Keys)
    except FileNotFoundError:
        return None


def write_private(path: Path, data: bytes) -> None:
    """A new file that only its user can read, from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


# ------------------------------------------------------------------------------------------------ the sockets


def as_client(own: Pair, server: str) -> Dress:
    """For a socket that connects to whoever has this public key."""

    def dress(context: zmq.Context[Any], socket: Socket) -> None:
        socket.curve_serverkey = server.encode()
        socket.curve_publickey = own.public.encode()
        socket.curve_secretkey = own.secret.encode()

    return dress


def as_server(own: Pair, admitted: Iterable[str]) -> Dress:
    """For a socket that listens, for whoever has one of these public keys. All sockets of one context have to
    admit the same."""
    keys = frozenset(z85.decode(key.encode()) for key in admitted)

    def dress(context: zmq.Context[Any], socket: Socket) -> None:
        _keep_door(context, keys)
        socket.curve_server = True
        socket.curve_secretkey = own.secret.encode()
        socket.zap_domain = DOMAIN
        socket.zap_enforce_domain = True  # where nobody answers nobody gets in
        socket.handshake_ivl = HANDSHAKE_MS

    return dress


def both(first: Dress, second: Dress) -> Dress:
    """One, then the other."""

    def dress(context: zmq.Context[Any], socket: Socket) -> None:
        first(context, socket)
        second(context, socket)

    return dress


def mesh(pair: Pair) -> Dress:
    """For vLLM's sockets between engines: one answers, the others ask."""
    server, client = as_server(pair, [pair.public]), as_client(pair, pair.public)

    def dress(context: zmq.Context[Any], socket: Socket) -> None:
        (server if socket.type == zmq.ROUTER else client)(context, socket)

    return dress


def _keep_door(context: zmq.Context[Any], keys: frozenset[bytes]) -> None:
    """Have a thread answer for this context who gets in, until the context ends."""
    # Not one of the context's own sockets: those may be closed by whoever ends it, while the thread waits.
    door = zmq.Context.shadow(context.underlying).socket(zmq.REP)
    door.linger = 0
    try:
        door.bind(DOOR)
    except zmq.ZMQError as wrong:
        door.close()
        if wrong.errno != zmq.EADDRINUSE:
            raise
        return  # by another socket of this context
    threading.Thread(target=_answer, args=(door, keys), name="curve-door", daemon=True).start()


def _answer(door: Socket, keys: frozenset[bytes]) -> None:
    with door, contextlib.suppress(zmq.ContextTerminated):
        while True:
            # Version, number, domain, address, identity, mechanism, and the key.
            words = door.recv_multipart()
            known = len(words) == 7 and words[5] == b"CURVE" and words[6] in keys
            says = (b"200", b"OK", b"engine", b"") if known else (b"400", b"not known", b"", b"")
            door.send_multipart([*words[:2], *says])


# -------------------------------------------------------------------------------------------- vLLM's own ends


class _Dressing:
    """A context as far as vLLM's function needs one."""

    def __init__(self, context: zmq.Context[Any], dress: Dress) -> None:
        self._context, self._dress = context, dress

    def socket(self, kind: int) -> Socket:
        """One that is dressed, and neither bound nor connected yet."""
        socket = self._context.socket(kind)
        self._dress(self._context, socket)
        return socket


def through(module: Any, choose: Callable[[str], Dress | None]) -> None:
    """From now on the sockets that this module of vLLM makes are dressed as is chosen for their endpoint."""
    stock = getattr(module.make_zmq_socket, "__wrapped__", module.make_zmq_socket)

    @wraps(stock)
    def make(ctx: Any, path: str, *args: Any, **options: Any) -> Any:
        dress = choose(path)
        return stock(ctx if dress is None else _Dressing(ctx, dress), path, *args, **options)

    module.make_zmq_socket = make
