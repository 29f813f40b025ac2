"""What a server and its fork server say to each other, one packet each (decision 137)."""

from __future__ import annotations

import msgspec

LARGEST = 1 << 17  # bytes of a packet


class Wanted(msgspec.Struct, frozen=True):
    """An engine core is to be forked. `env` is how its environment differs from the one that the fork server
    was started with; None takes a variable away."""

    number: int
    spec: str  # the file
    log: str  # the file; it is there
    env: dict[bytes, bytes | None]
    files: tuple[int, int]  # soft and hard limit of open files


class Begun(msgspec.Struct, frozen=True, tag=True):
    """It is there, leads its process group, and waits until this was sent. A pidfd comes with it."""

    number: int
    pid: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    """It has ended, with an exit code as `subprocess` has them."""

    number: int
    code: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The kernel did not fork."""

    number: int
    why: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """It forks nobody, and ends."""

    why: str


Said = Begun | Ended | Failed | Refused
