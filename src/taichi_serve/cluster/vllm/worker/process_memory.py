"""CPU memory of another process on this host: process_vm_readv (Linux, same user)."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taichi_serve.cluster.vllm.worker.host import Rows

IOV_MAX = 1024


class ThreadCopy:
    """A copy in a thread; ctypes lets go of the interpreter while the kernel copies."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def done(self) -> bool:
        """Raises what the thread raised."""
        if not self._future.done():
            return False
        self._future.result()
        return True


class CpuMemory:
    """Another process's memory, read with process_vm_readv (Linux, same user)."""

    def __init__(self) -> None:
        vector: list[Any] = [ctypes.c_void_p, ctypes.c_ulong]
        self._read = ctypes.CDLL(None, use_errno=True).process_vm_readv
        self._read.restype = ctypes.c_ssize_t
        self._read.argtypes = [ctypes.c_int, *vector, *vector, ctypes.c_ulong]
        # What a step waits for never stands behind what is copied beside it, nor a tail behind a long piece.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="kv-copy")
        self._beside = ThreadPoolExecutor(2, thread_name_prefix="kv-copy-beside")

    def offer(self, ranges: Rows) -> list[dict[str, Any]]:
        """Addresses are enough: the kernel checks who reads."""
        return [{"address": int(a), "size": int(n)} for a, n, _ in ranges]

    def reach(self, peer: dict[str, Any], rows: Rows) -> NDArray[np.uint64]:
        """The peer's own addresses, once the kernel has let us read one row."""
        probe = np.empty(int(rows[0, 1]), dtype=np.uint8)
        target = np.array([[probe.ctypes.data, probe.nbytes, 0]], dtype=np.uint64)
        self._copy(peer["pid"], target, rows[:1, 0])
        return np.ascontiguousarray(rows[:, 0])

    def copy(
        self, peer: dict[str, Any], target: Rows, source: NDArray[np.uint64], in_step: bool
    ) -> ThreadCopy:
        """In a thread; waited for when the step needs it."""
        threads = self._threads if in_step else self._beside
        future = threads.submit(self._copy, peer["pid"], target, source)
        if in_step:
            future.result()
        return ThreadCopy(future)

    def leave(self, peer: dict[str, Any]) -> None:
        """Nothing is mapped."""

    def _copy(self, pid: int, target: Rows, source: NDArray[np.uint64]) -> None:
        here = np.ascontiguousarray(target[:, :2])
        there = np.column_stack([source, target[:, 1]])
        for at in range(0, len(here), IOV_MAX):
            mine, theirs = here[at : at + IOV_MAX], np.ascontiguousarray(there[at : at + IOV_MAX])
            wanted = int(mine[:, 1].sum())
            count = len(mine)
            got = self._read(pid, mine.ctypes.data, count, theirs.ctypes.data, count, 0)
            if got != wanted:
                number = ctypes.get_errno()
                raise OSError(number, f"read {got} of {wanted} bytes: {os.strerror(number)}")
