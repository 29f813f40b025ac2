"""A port that stays free until the one that it is for listens on it."""

from __future__ import annotations

import socket

LOOPBACK = "127.0.0.1"


def reserve(host: str = LOOPBACK) -> socket.socket:
    """A port of one address of this host that nobody else is given while this socket is open.

    Only who asks for this very port can listen on it: the kernel gives out no port that is bound, and lets a
    second socket bind it where both set SO_REUSEADDR, as ZeroMQ and vLLM's server do.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((host, 0))
    return reserved


def port_of(reserved: socket.socket) -> int:
    """Its number."""
    port: int = reserved.getsockname()[1]
    return port
