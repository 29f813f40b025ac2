"""Processor time of a process and all below it, from /proc: no library for it comes with a plain install."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Seconds that the process and those below it have used so far; 0.0 where it is gone."""
    processes = dict(_processes())
    total, waiting = 0.0, [pid]
    while waiting:
        one = waiting.pop()
        total += processes.get(one, (0, 0.0))[1]
        waiting += [child for child, (parent, _) in processes.items() if parent == one]
    return total


def _processes() -> Iterator[tuple[int, tuple[int, float]]]:
    """Of each process its parent and its seconds."""
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                # The name, in parentheses, may hold anything; after it come state, parent, ..., user, system.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
            yield int(entry.name), (int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS)


def available() -> int:
    """Bytes of memory that a new process could have."""
    lines = (PROC / "meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
