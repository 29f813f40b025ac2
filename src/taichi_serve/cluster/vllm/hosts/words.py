"""What a server and the holders of its engines say to each other."""

from __future__ import annotations

import msgspec

from taichi_serve.cluster.vllm.curve import Keys, Pair

FREE_SECONDS = 5.0  # after the last word of its server another one may have an engine
LATER = b"later"  # in the place of an Offer: its server lived until just now, or lives


class Order(msgspec.Struct, frozen=True):
    """What is to be started, and for which server. `run` is the name of the directory on each host: servers
    that have an engine one after the other have it in common."""

    server: str
    run: str
    name: str
    engine_id: str
    handshake: str
    argv: list[str]
    env: dict[str, str]
    keys: Keys


class Begun(msgspec.Struct, frozen=True):
    """It is there."""

    pid: int
    host: str
    niceness: int  # above 0 it gets less of the cores than others


class Said(msgspec.Struct, frozen=True):
    """What it wrote since, its exit status once it has ended, and whose prompts it computed then."""

    words: bytes
    code: int | None = None
    flight: bytes = b""


class Offer(msgspec.Struct, frozen=True):
    """An engine that serves, whose server is gone: it is the next one's that asks."""

    run: str
    name: str
    engine_id: str
    mesh: Pair
    begun: Begun
