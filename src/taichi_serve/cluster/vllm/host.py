"""The machine under the CPUs: cores, NUMA nodes and memory that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

NODES = Path("/sys/devices/system/node")
MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def cores() -> set[int]:
    """Those that this process may run on."""
    return os.sched_getaffinity(0)


def nodes(usable: set[int], root: Path = NODES) -> int:
    """How many NUMA nodes these cores are of; one where the kernel does not say."""
    lists = (path.read_text() for path in root.glob("node[0-9]*/cpulist"))
    return max(1, sum(bool(numbers(text) & usable) for text in lists))


def numbers(text: str) -> set[int]:
    """The kernel's form of a set: "0-3,8" is 0, 1, 2, 3 and 8."""
    found: set[int] = set()
    for part in text.strip().split(","):
        low, _, high = part.partition("-")
        if low:
            found.update(range(int(low), int(high or low) + 1))
    return found


def free_memory(info: Path = MEMORY, group: Path = GROUP) -> int:
    """Bytes that are free or can be freed, and within the limit of this control group."""
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    try:
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
    except OSError:  # the root, or the first version of control groups
        return free
    return free if limit.strip() == "max" else min(free, max(0, int(limit) - int(used)))
