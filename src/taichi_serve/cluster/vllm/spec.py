"""What an engine process is started with."""

from __future__ import annotations

import signal

import msgspec

SIGNAL = signal.SIGUSR1  # to a core, from its holder: it has another server now (core/again.py)


class Spec(msgspec.Struct, frozen=True):
    """What one engine process is started with: vLLM's command line, and what differs between instances."""

    argv: list[str]
    engine_id: str
    handshake: str  # where vLLM's start-up handshake is spoken
    parent: int  # the server's process, or its holder: the engine ends with it
    shared: bool = False  # the directory is that of a host's instances, and not the parent's
