"""Python runs this at its start where its folder is in PYTHONPATH (test_unreadable.py): every third read of a
peer's memory asks the kernel for a process that does not exist, which the kernel refuses."""

from itertools import count
from typing import Any

from taichi_serve.cluster.vllm.worker.process_memory import CpuMemory

NOBODY = 1 << 22  # above every process id of Linux
EVERY = 3

reads = count(1)
copy = CpuMemory.copy


def refused_now_and_then(self: CpuMemory, peer: dict[str, Any], *rest: Any) -> Any:
    return copy(self, {**peer, "pid": NOBODY} if next(reads) % EVERY == 0 else peer, *rest)


CpuMemory.copy = refused_now_and_then  # type: ignore[method-assign]
