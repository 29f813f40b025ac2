"""Numbers that every front end sees, in a file that all of them map: vLLM's own ways of sharing them.

`loads` are open connections of each front end: a new one goes to whoever has fewest. `admissions` are open
requests of each, for --max-num-queued-reqs. Each front end writes its own numbers only.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from vllm.v1.engine.admission_control import SharedAdmissionStats

NOT_ACCEPTING = 2**31 - 1  # never the least: vLLM's word for a front end that does not accept
LOAD_BYTES = 4


class Shared:
    """The file, mapped. `make` it before anybody maps it."""

    def __init__(self, path: Path, count: int) -> None:
        """Map what was made for so many front ends."""
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        whole = memoryview(self._map)
        counters = SharedAdmissionStats.COUNTER_BYTES * SharedAdmissionStats.num_counters(count)
        self.admissions = whole[:counters].cast("q")
        self.loads = whole[counters : counters + LOAD_BYTES * count].cast("i")

    @classmethod
    def make(cls, path: Path, count: int) -> Shared:
        """A new file, in which nobody accepts."""
        counters = SharedAdmissionStats.COUNTER_BYTES * SharedAdmissionStats.num_counters(count)
        path.write_bytes(bytes(counters + LOAD_BYTES * count))
        shared = cls(path, count)
        for index in range(count):
            shared.forget(index)
        return shared

    def forget(self, index: int) -> None:
        """This front end is gone: it has no connections, accepts none, and holds no requests."""
        self.loads[index] = NOT_ACCEPTING
        self.admissions[index * SharedAdmissionStats.COUNTERS_PER_SLOT] = 0

    def connections(self, index: int) -> int:
        """Open connections of this front end."""
        load = self.loads[index]
        return 0 if load == NOT_ACCEPTING else load
