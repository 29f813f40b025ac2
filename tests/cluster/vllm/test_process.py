"""The port that an engine's side channel gets, and what happens where it is taken all the same."""

from __future__ import annotations

import socket

import pytest

zmq = pytest.importorskip("zmq")
pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.kv import FlowConnectorScheduler  # noqa: E402
from taichi_serve.cluster.vllm.process import LOOPBACK, reserve  # noqa: E402


def scheduler_at(port: int) -> FlowConnectorScheduler:
    """One without an engine, whose side channel has this port."""
    scheduler = object.__new__(FlowConnectorScheduler)
    scheduler.side_channel_host, scheduler.side_channel_port = LOOPBACK, port
    scheduler._nixl_handshake_listener_t = None
    return scheduler


def test_zeromq_can_listen_on_a_reserved_port_and_nobody_else_is_given_it() -> None:
    with reserve() as reserved:
        port = reserved.getsockname()[1]
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.bind((LOOPBACK, port))
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.bind(f"tcp://{LOOPBACK}:{port}")


def test_a_side_channel_that_is_taken_is_one_clear_error_and_no_wait() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"side channel cannot listen on {LOOPBACK}:{port}"):
            scheduler_at(port).set_xfer_handshake_metadata({})
