"""A tiny process beside an engine core that is there when everybody else was killed.

The kernel ends a core with its server and workers with their core, but nobody then takes away what they made:
shared memory, sockets, the server's directory. The janitor waits for the core's end, ends what is left of its
process group, and removes its shared memory; where the server is gone too it removes the server's directory.
A server that lives sees to all of it itself, the janitor included (process.py). It is forked before the core
does anything, and uses the standard library alone, but for its title.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from pathlib import Path

from setproctitle import getproctitle, setproctitle

from taichi_serve.cluster.vllm.belongings import (
    members,
    named_after,
    offered_by,
    remove_with_the_last,
    shared_memory,
)

LOOK_SECONDS = 15.0  # between two looks at what is shared, while the engine is young; rarer later
LOOK_RARELY = 300.0
GRACE = 1.0  # seconds in which the engine's processes may end by themselves; Python's tracker cleans up in it
LEFT_SECONDS = 3.0


def watch(server: int, directory: Path, mine: tuple[str, str] | None = None) -> None:
    """Fork it. `server` is the parent of this process, whose own process group it looks after; nothing
    happens where this process leads none. Where the directory has other parents' engines too, only what has
    the name and the engine id of `mine` is its to remove."""
    core = os.getpid()
    if os.getpgrp() != core:
        return
    core_fd, server_fd = os.pidfd_open(core), os.pidfd_open(server)
    if os.fork():
        os.close(core_fd)
        os.close(server_fd)
        return
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _close_all_but(0, 1, 2, core_fd, server_fd)  # whoever waits for the end of a socket would wait for us
        setproctitle(f"{getproctitle()} (janitor)")  # else it looks as if there were two cores
        _run(core_fd, server_fd, os.getpgrp(), directory, mine)
    finally:
        os._exit(0)


def _run(core: int, server: int, group: int, directory: Path, mine: tuple[str, str] | None) -> None:
    shared: set[Path] = set()
    began = time.monotonic()
    while not _ended(core, LOOK_SECONDS if time.monotonic() - began < LOOK_RARELY else LOOK_RARELY):
        shared |= shared_memory(group)
    shared |= shared_memory(group)
    until = time.monotonic() + GRACE
    while _others(group) and time.monotonic() < until:
        time.sleep(0.02)
    for process in _others(group):
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    for path in shared:
        path.unlink(missing_ok=True)
    if _ended(server, LEFT_SECONDS):  # its other engines may be a moment behind
        if mine is not None:
            _remove(directory, *mine)
            return
        for _ in range(10):
            shutil.rmtree(directory, ignore_errors=True)
            if not directory.exists():
                return
            time.sleep(0.2)


def _close_all_but(*kept: int) -> None:
    for path in list(Path("/proc/self/fd").iterdir()):
        if int(path.name) not in kept:
            with contextlib.suppress(OSError):  # that of the list itself is closed
                os.close(int(path.name))


def _remove(directory: Path, name: str, engine_id: str) -> None:
    """What one engine left there, and the directory with the last of them."""
    named = named_after(engine_id)
    own = {name, *(f"{name}.{kind}" for kind in ("json", "log"))}
    for path in _paths(directory):
        if path.is_dir() and path.name in own:
            shutil.rmtree(path, ignore_errors=True)
        elif path.name in own or named.search(path.name) or offered_by(path, engine_id):
            path.unlink(missing_ok=True)
    remove_with_the_last(directory)


def _paths(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(directory.iterdir())
    return []


def _ended(process: int, seconds: float) -> bool:
    """Whether the process behind this descriptor ends within so many seconds."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _others(group: int) -> list[int]:
    """Living processes of the group, but for this one."""
    return [number for number in members(group) if number != os.getpid()]
