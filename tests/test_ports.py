"""Ports are kept for those that will listen on them."""

from __future__ import annotations

import socket

import pytest

from taichi_serve.ports import LOOPBACK, port_of, reserve


def test_nobody_else_is_given_a_reserved_port() -> None:
    with reserve() as reserved, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((LOOPBACK, port_of(reserved)))


def test_who_asks_for_it_as_servers_do_can_listen_on_it() -> None:
    with reserve() as reserved, socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((LOOPBACK, port_of(reserved)))
        server.listen()


def test_zeromq_can_listen_on_it() -> None:
    zmq = pytest.importorskip("zmq")
    with reserve() as reserved, zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(f"tcp://{LOOPBACK}:{port_of(reserved)}")
