"""What a server and its processes hold of the machine, and whether it grows with the moves they make.

Counts (descriptors, mappings, threads, files) are to be at the end what they were after a warm-up. Memory
leaps (a heap grows; a step of a new size makes the kernels keep more), so it is judged twice. What every move
leaves behind is in every stretch between two samples: the median stretch shows it, and no leap does. And all
the leaps together may not come to much. A leak of less than four KiB a move that happens in less than half of
the stretches is not found.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from servers import Server

Held = dict[str, int]  # what, and how many or how many bytes

# How much more of each there may be at the end than after the warm-up: what comes and goes by chance.
# A leak of one in a hundred moves is well above that in 10,000. A thread that starts late maps its stack, a
# guard page and an arena; a heap that grows or shrinks splits or joins its mappings.
SLACK = {
    "descriptors": 2,
    "sockets": 2,
    "threads": 2,
    "mappings": 16,
    "files": 0,
    "shared": 0,
    "strays": 50,  # others on this machine leave some behind too
    "kv_tokens": 0,
}
MEMORY = ("rss", "private", "gpu")  # bytes
BYTES_PER_MOVE = 1024  # in the median stretch
BYTES_IN_LEAPS = 4096  # a move, over all stretches


@dataclass(frozen=True, slots=True)
class Sample:
    """What everybody held when the server was idle after so many moves: by process, and of the machine."""

    moves: int
    held: Mapping[str, Held]


def sample(server: Server, state: dict[str, Any]) -> Sample:
    """Of every process of the server, and of what they share; the server must be idle."""
    gpu = gpu_memory()
    held: dict[str, Held] = {}
    for pid, name in named(server, state).items():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            held[name] = of_process(pid) | ({"gpu": gpu[pid]} if pid in gpu else {})
    mapped, strays = shared_memory({process.pid for process in server.family()})
    held["all"] = {
        "files": sum(1 for _ in server.directory.glob("taichi-*/**/*")),
        "shared": len(mapped),
        "strays": len(strays),
        "kv_tokens": sum(instance["kv_tokens"] for instance in state["instances"]),
    }
    return Sample(sum(state["moves"][move] for move in MOVES), held)


MOVES = ("hand-over", "degrade", "backflow", "operator", "drain", "rescue")


def named(server: Server, state: dict[str, Any]) -> dict[int, str]:
    """A name for each process: an engine has its instance's, a child that of its parent and a number."""
    engines = {instance["pid"]: instance["name"] for instance in state["instances"]}
    this, *others = server.family()
    names = {this.pid: "server"}
    for process in others:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            parent = names.get(process.ppid(), "?")
            number = sum(name.startswith(f"{parent}.") for name in names.values())
            names[process.pid] = engines.get(process.pid) or f"{parent}.{number}"
    return names


def shared_memory(ours: set[int]) -> tuple[set[str], set[str]]:
    """Files of shared memory: those that our processes have mapped, and those that nobody has, which may be
    ours, left behind. What only others have mapped is theirs."""
    mapped: dict[str, set[bool]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
            for path in set(re.findall(r" (/dev/shm/\S+)$", (process / "maps").read_text(), re.MULTILINE)):
                mapped.setdefault(path, set()).add(int(process.name) in ours)
    files = {str(path) for path in Path("/dev/shm").iterdir()}
    return {path for path in files if True in mapped.get(path, ())}, files - mapped.keys()


def of_process(pid: int) -> Held:
    """What one process holds, by the word of the kernel."""
    here = Path(f"/proc/{pid}")
    kinds = []
    for descriptor in (here / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            kinds.append(str(descriptor.readlink()))
    rollup = dict(line.split(":") for line in (here / "smaps_rollup").read_text().splitlines()[1:])
    return {
        "descriptors": len(kinds),
        "sockets": sum(kind.startswith("socket:") for kind in kinds),
        "threads": sum(1 for _ in (here / "task").iterdir()),
        "mappings": len((here / "maps").read_text().splitlines()),
        "rss": _bytes(rollup["Rss"]),
        "private": _bytes(rollup["Private_Dirty"]),
    }


def _bytes(text: str) -> int:
    number, unit = text.split()
    assert unit == "kB"
    return int(number) * 1024


def gpu_memory() -> dict[int, int]:
    """Bytes of GPU memory of each process, where there is a GPU and its driver tells."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    return by_process(subprocess.run(query, check=True, capture_output=True, text=True, timeout=30).stdout)


def by_process(text: str) -> dict[int, int]:
    """Bytes by process; one with memory on several GPUs has a line for each."""
    found: dict[int, int] = {}
    for line in text.splitlines():
        pid, memory = (word.strip() for word in line.split(","))
        if memory.isdigit():  # in some containers it is not told
            found[int(pid)] = found.get(int(pid), 0) + (int(memory) << 20)
    return found


# ----------------------------------------------------------------------------------------- the verdict


def grown(samples: Sequence[Sample], by_design: Mapping[str, int] | None = None) -> list[str]:
    """What grew from the first sample, taken after the warm-up, to the last: a line for each, or nothing.

    `by_design` has bytes that a process is meant to keep of every move.
    """
    first, last = samples[0].held, samples[-1].held
    lines = [f"process {name} {how}" for name, how in _changed(first, last)]
    for name in first.keys() & last.keys():
        for what, slack in SLACK.items():
            before, after = first[name].get(what, 0), last[name].get(what, 0)
            if after > before + slack:
                lines.append(f"{name}: {what} {before} -> {after}, {slack} more are allowed")
        for what in MEMORY:
            points = [(s.moves, s.held[name][what]) for s in samples if what in s.held.get(name, {})]
            if len(points) > 1 and (how := _grows(points, (by_design or {}).get(name, 0))):
                lines.append(f"{name}: {what} {how}")
    return sorted(lines)


def _changed(first: Mapping[str, Held], last: Mapping[str, Held]) -> list[tuple[str, str]]:
    return [(n, "is gone") for n in first.keys() - last.keys()] + [
        (n, "has come") for n in last.keys() - first.keys()
    ]


def rates(points: Sequence[tuple[int, int]]) -> list[float]:
    """Bytes a move in every stretch between two samples."""
    return [(b - a) / (after - before) for (before, a), (after, b) in pairwise(points)]


def _grows(points: Sequence[tuple[int, int]], by_design: int) -> str:
    """In what way the memory of one kind grows; "" where it does not."""
    steady = statistics.median(rates(points))
    if steady > BYTES_PER_MOVE + by_design:
        return f"grows steadily by {steady:.0f} bytes a move, {BYTES_PER_MOVE + by_design} are allowed"
    (whole,) = rates([points[0], points[-1]])
    if whole > BYTES_IN_LEAPS + by_design:
        return f"grows by leaps, of {whole:.0f} bytes a move in all, {BYTES_IN_LEAPS + by_design} are allowed"
    return ""
