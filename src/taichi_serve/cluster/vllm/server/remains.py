"""What an engine process left behind when it was killed is waited for, and taken away. And how it ended."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from pathlib import Path

from taichi_serve.cluster.vllm.belongings import UNNAMED, members, named_after, offered_by

KEPT_LOGS = 4  # of an instance's dead processes


def wait_gone(group: int, seconds: float) -> bool:
    """Wait until nothing of a group runs any more, at most so long; whether that came true."""
    until = time.monotonic() + seconds
    while any(True for _ in members(group)):
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True


def reap(group: int) -> None:
    """Ask about the dead of a group whose leader was asked about. They are this process's children only where
    it is the first one of a container, to which orphans come; nobody else would ask."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass


def remove_files(directory: Path, name: str, engine_id: str) -> None:
    """Whatever a dead process left in its server's directory, but its log. Others read some of it while they
    meet: to them it looks as if it had never been there."""
    shutil.rmtree(directory / name, ignore_errors=True)
    named = named_after(engine_id)
    own = {f"{name}.{kind}" for kind in ("json", "start", "in", "out")}
    paths = list(directory.iterdir())
    bound = Path("/proc/net/unix").read_text()  # after the list: whatever is in both had its owner by then
    for path in paths:
        nobodys = path.is_socket() and UNNAMED.fullmatch(path.name) and str(path) not in bound
        if path.name in own or named.search(path.name) or nobodys or offered_by(path, engine_id):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def forget_logs(directory: Path, instance: str) -> None:
    """Keep the first log of an instance and those of its last processes: one that is lost every ten minutes
    for a year fills no disk."""

    def number(path: Path) -> int:
        return int(path.stem.removeprefix(instance).removeprefix(".") or 1)

    logs = [p for p in directory.glob(f"{instance}*.log") if re.fullmatch(rf"{instance}(\.\d+)?", p.stem)]
    for path in sorted(logs, key=number)[1 : -KEPT_LOGS - 1]:
        path.unlink(missing_ok=True)


def lives(process: int) -> bool:
    """Whether a process with this number runs; one that nobody has asked about yet does not."""
    return (_stat(process) or ["X"])[0] not in "ZX"


def exit_code(process: int) -> int:
    """How one ended that nobody has asked about yet; where nobody can tell, as if it was killed."""
    stat = _stat(process)
    return os.waitstatus_to_exitcode(int(stat[49])) if stat and stat[0] == "Z" else -signal.SIGKILL


def _stat(process: int) -> list[str] | None:
    """Its words from its state on; see proc(5)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None


def ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "it still runs"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
