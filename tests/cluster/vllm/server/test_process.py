"""Engine processes: a side channel's port that is taken, and the shared memory that a killed group leaves."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.belongings import shared_memory
from taichi_serve.cluster.vllm.core.connector import FlowConnectorScheduler
from taichi_serve.ports import LOOPBACK


def scheduler_at(port: int) -> FlowConnectorScheduler:
    """One without an engine, whose side channel has this port."""
    scheduler = object.__new__(FlowConnectorScheduler)
    scheduler.side_channel_host, scheduler.side_channel_port = LOOPBACK, port
    scheduler._nixl_handshake_listener_t = None
    return scheduler


def test_a_side_channel_that_is_taken_is_one_clear_error_and_no_wait() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"side channel cannot listen on {LOOPBACK}:{port}"):
            scheduler_at(port).set_xfer_handshake_metadata({})


@pytest.fixture
def mapped() -> Iterator[tuple[Path, Path]]:
    """Shared memory mapped here: a file named as vLLM names its queues, and somebody's model."""
    ring, model = (Path("/dev/shm") / f"{name}{os.getpid()}" for name in ("psm_", "model-"))
    maps = []
    for path in (ring, model):
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            maps.append(mmap.mmap(file.fileno(), 0))
    yield ring, model
    for each in maps:
        each.close()
    ring.unlink(missing_ok=True)
    model.unlink()


def test_what_vllm_shares_within_a_group_is_known_and_nothing_else(mapped: tuple[Path, Path]) -> None:
    ring, model = mapped
    found = shared_memory(os.getpgid(0))
    assert ring in found
    assert model not in found


def test_what_was_unlinked_is_not_found_again(mapped: tuple[Path, Path]) -> None:
    ring, _ = mapped
    ring.unlink()
    assert ring not in shared_memory(os.getpgid(0))
