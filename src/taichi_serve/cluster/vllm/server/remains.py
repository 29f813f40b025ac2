"""What an engine process has of the machine beside itself, and may leave behind when it is killed: the other
processes of its group, shared memory, and files in the directory of its server. And how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

# In /proc/PID/maps: the queues and locks between an engine core and its workers, and among the workers. A
# model that lies in /dev/shm is not one of these.
SHARED = re.compile(r" (/dev/shm/(?:psm_|sem\.mp-|vllm_dist_|vllm_offload_)[^/\s]+)$", re.MULTILINE)
# vLLM's own sockets inside an instance: their names say nothing of their owner.
UNNAMED = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
KEPT_LOGS = 4  # of an instance's dead processes


def members(group: int) -> Iterator[int]:
    """The processes of a group that run, stopped ones too; dead ones that nobody has asked about are none."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # it ended meanwhile
            state, _, of = (process / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if int(of) == group and state not in "ZX":
                yield int(process.name)


def shared_memory(group: int) -> set[Path]:
    """Files of shared memory that vLLM made for itself and that processes of this group have mapped."""
    found: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
            if os.getpgid(int(process.name)) == group:
                found.update(Path(name) for name in SHARED.findall((process / "maps").read_text()))
    return found


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
    # An id is not the beginning of a longer one: i1 not of i10, and not of i1.2.
    named = re.compile(rf"{re.escape(engine_id)}(?!\d|\.\d)")
    own = {f"{name}.{kind}" for kind in ("json", "start", "in", "out")}
    paths = list(directory.iterdir())
    bound = Path("/proc/net/unix").read_text()  # after the list: whatever is in both had its owner by then
    for path in paths:
        nobodys = path.is_socket() and UNNAMED.fullmatch(path.name) and str(path) not in bound
        if path.name in own or named.search(path.name) or nobodys or _offered_by(path, engine_id):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def remove_with_the_last(directory: Path) -> None:
    """Take away a directory of several engines, of which none is there any more. Sockets may be left whose
    owner's last thread has not ended yet: nobody will come for them."""
    with contextlib.suppress(OSError):
        if all(UNNAMED.fullmatch(path.name) for path in directory.iterdir()):
            shutil.rmtree(directory, ignore_errors=True)


def _offered_by(path: Path, engine_id: str) -> bool:
    """Whether it says how this engine's memory is reached (`wire.offer_file`)."""
    if not (path.name.startswith("kv-") and path.suffix == ".json"):
        return False
    try:
        return bool(json.loads(path.read_text())["engine_id"] == engine_id)
    except (OSError, ValueError, KeyError, TypeError):
        return False


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
