"""vLLM's sockets of an engine, where it is spoken to over TCP: its core's to the server, and those by which
engines tell each other how their memory is reached."""

from __future__ import annotations

from pathlib import Path

from vllm.distributed.kv_transfer.kv_connector.v1.nixl import utils
from vllm.v1.engine import core

from taichi_serve.cluster.vllm.curve import Dress, as_client, mesh, read_keys, through


def dress_core(directory: Path, engine_id: str) -> None:
    """Have those of the core speak with the keys of this engine. Where it has none they are files."""
    if (keys := read_keys(directory, engine_id)) is not None:
        dress = as_client(keys.own, keys.server)
        through(core, lambda path: over_tcp(path, dress))


def dress_peers(directory: Path, engine_id: str) -> None:
    """The same of the side channel between engines, in every process of one. Where it has no keys it is a
    port of the loopback interface, as vLLM makes it."""
    if (keys := read_keys(directory, engine_id)) is not None:
        dress = mesh(keys.mesh)
        through(utils, lambda path: over_tcp(path, dress))


def over_tcp(path: str, dress: Dress) -> Dress | None:
    """Files need no keys."""
    return dress if path.startswith("tcp://") else None
