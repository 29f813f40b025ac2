"""What an engine process has of the machine beside itself, and may leave behind when it is killed: the other
processes of its group, shared memory, and files in the directory of its server. The server looks for it, and
the janitor of the engine where there is no server any more."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

# In /proc/PID/maps: the queues and locks between an engine core and its workers, and among the workers. A
# model that lies in /dev/shm is not one of these.
SHARED = re.compile(r" (/dev/shm/(?:psm_|sem\.mp-|vllm_dist_|vllm_offload_)[^/\s]+)$", re.MULTILINE)
# vLLM's own sockets inside an instance: their names say nothing of their owner.
UNNAMED = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


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


def named_after(engine_id: str) -> re.Pattern[str]:
    """What names of an engine's files have in them. An id is not the beginning of a longer one: i1 not of
    i10, and not of i1.2."""
    return re.compile(rf"{re.escape(engine_id)}(?!\d|\.\d)")


def remove_with_the_last(directory: Path) -> None:
    """Take away a directory of several engines, of which none is there any more. Sockets may be left whose
    owner's last thread has not ended yet: nobody comes for them. What an engine brings that comes just now
    stays; or it finds that the directory is gone, and makes another."""
    with contextlib.suppress(OSError):
        left = list(directory.iterdir())
        if all(UNNAMED.fullmatch(path.name) for path in left):
            for path in left:
                path.unlink(missing_ok=True)
            directory.rmdir()


def offered_by(path: Path, engine_id: str) -> bool:
    """Whether it says how this engine's memory is reached (`wire.offer_file`)."""
    if not (path.name.startswith("kv-") and path.suffix == ".json"):
        return False
    try:
        return bool(json.loads(path.read_text())["engine_id"] == engine_id)
    except (OSError, ValueError, KeyError, TypeError):
        return False
