"""The environment that every engine process on a CPU has beside the server's own."""

from __future__ import annotations

import os

# UCX, under NIXL, else hooks into each mapping of memory, which costs a step of the model 3 %; without its
# hooks it registers memory when told to, which is all that KV needs. And glibc, which reads its settings when
# a program begins, else gives the memory of temporaries back to the kernel and has it zeroed again: up to
# 50,000 page faults in 100 steps of a tiny model, by luck, and 2,000 so, which is 5 to 10 % of a step.
_ON_CPU = {
    "UCX_MEM_EVENTS": "n",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # bytes; glibc takes no more
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
}


def on_cpu() -> dict[str, str]:
    """It, as far as the user has not said anything else."""
    return {name: value for name, value in _ON_CPU.items() if name not in os.environ}
