"""GPU memory of another process on this host: CUDA IPC handles, and one kernel that copies many rows."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.triton_utils import tl, triton

from taichi_serve.cluster.vllm.worker.host import Rows

HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1
WORD = 8  # rows of KV are always multiples of eight bytes
BLOCK = 2048
# Programs of one copy, each of which takes many rows: a few SMs move tens of GB/s, and the steps keep the
# rest.
PROGRAMS = 32


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


@triton.jit(do_not_specialize=["rows"])
def _copy_rows(targets, sources, rows, words, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row i: `words` 64-bit words from address sources[i] to address targets[i]."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        target = tl.load(targets + row).to(tl.pointer_type(tl.int64))
        source = tl.load(sources + row).to(tl.pointer_type(tl.int64))
        for start in range(0, words, block):
            offsets = start + tl.arange(0, block)
            mask = offsets < words
            tl.store(target + offsets, tl.load(source + offsets, mask=mask), mask=mask)


class EventCopy:
    """A copy on a stream of its own, over when its event has passed."""

    def __init__(self, event: torch.cuda.Event, keep: tuple[torch.Tensor, ...]) -> None:
        self._event = event
        self._keep = keep  # the kernel reads the addresses from them

    def done(self) -> bool:
        """Never waits for the device."""
        return bool(self._event.query())


class CudaMemory:
    """Memory of the current device, offered and reached through CUDA IPC."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._stream = torch.cuda.Stream()  # of reads that a step waits for
        self._beside = torch.cuda.Stream()  # of those that run beside the steps
        self._open: dict[tuple[int, str], int] = {}  # (process, handle) -> where it is mapped here

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._driver, name)(*args)
        if status:
            raise OSError(status, f"{name} returned {status}")

    def offer(self, ranges: Rows) -> list[dict[str, Any]]:
        """One handle for every allocation that the ranges lie in."""
        allocations: dict[int, dict[str, Any]] = {}
        for address in ranges[:, 0]:
            base, size = ctypes.c_uint64(), ctypes.c_size_t()
            self._call(
                "cuMemGetAddressRange_v2",
                ctypes.byref(base),
                ctypes.byref(size),
                ctypes.c_uint64(int(address)),
            )
            if base.value not in allocations:
                handle = _Handle()
                self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base.value))
                word = {"address": base.value, "size": size.value, "handle": bytes(handle).hex()}
                allocations[base.value] = word
        return list(allocations.values())

    def reach(self, peer: dict[str, Any], rows: Rows) -> NDArray[np.uint64]:
        """Where the peer's rows are mapped here."""
        spaces = sorted(peer["memory"], key=lambda space: int(space["address"]))
        starts = np.array([space["address"] for space in spaces], dtype=np.uint64)
        mapped = np.array([self._map(peer["pid"], space["handle"]) for space in spaces], dtype=np.uint64)
        which = np.searchsorted(starts, rows[:, 0], side="right") - 1
        offsets = rows[:, 0] - starts[which]
        sizes = np.array([space["size"] for space in spaces], dtype=np.uint64)
        if bool((which < 0).any()) or bool((offsets + rows[:, 1] > sizes[which]).any()):
            raise OSError("a row lies outside of the memory that the peer offered")
        return np.asarray(mapped[which] + offsets, dtype=np.uint64)

    def _map(self, pid: int, handle: str) -> int:
        key = (pid, handle)
        if key not in self._open:
            at = ctypes.c_uint64()
            word = _Handle.from_buffer_copy(bytes.fromhex(handle))
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(at), word, ctypes.c_uint(LAZY_PEER_ACCESS))
            self._open[key] = at.value
        return self._open[key]

    def copy(
        self, peer: dict[str, Any], target: Rows, source: NDArray[np.uint64], in_step: bool
    ) -> EventCopy:
        """One kernel for each length of row, on a side stream; with `in_step` the step waits for it."""
        keep: list[torch.Tensor] = []
        stream = self._stream if in_step else self._beside
        with torch.cuda.stream(stream):
            for length in np.unique(target[:, 1]):
                same = target[:, 1] == length
                addresses = np.stack([target[same, 0], source[same]]).view(np.int64)
                # Not pinned: a fresh pinned allocation waits for the whole device.
                there = torch.from_numpy(addresses).to("cuda")
                rows = there.shape[1]
                grid = (rows if in_step else min(rows, PROGRAMS),)
                _copy_rows[grid](there[0], there[1], rows, int(length) // WORD, block=BLOCK)
                keep.append(there)
            event = torch.cuda.Event()
            event.record(stream)
        if (
            in_step
        ):  # whether the source still lives is asked after the last byte, and before the step goes on
            event.synchronize()
        return EventCopy(event, tuple(keep))

    def leave(self, peer: dict[str, Any]) -> None:
        """Unmap what was the peer's, once no kernel reads from it any more."""
        self._stream.synchronize()
        self._beside.synchronize()
        for key in [key for key in self._open if key[0] == peer["pid"]]:
            self._driver.cuIpcCloseMemHandle(ctypes.c_uint64(self._open.pop(key)))
