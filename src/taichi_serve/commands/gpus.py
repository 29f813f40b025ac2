"""NVIDIA's GPUs of this machine as its management library (NVML) sees them: energy, memory, names.

It comes with the driver and is asked directly: no Python package for it comes with a plain install.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
VISIBLE = "CUDA_VISIBLE_DEVICES"
NAME_BYTES = 96


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@dataclass(frozen=True, slots=True)
class Gpus:
    """The ones that servers started here may use; none where there is no driver."""

    library: Any
    handles: tuple[ctypes.c_void_p, ...] = ()

    @classmethod
    def find(cls, load: Callable[[str], Any] = ctypes.CDLL) -> Gpus:
        """Those that CUDA_VISIBLE_DEVICES names by their numbers, or all."""
        try:
            library = load(LIBRARY)
        except OSError:
            return cls(None)
        count = ctypes.c_uint()
        if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return cls(None)
        found = []
        for number in _visible(count.value):
            handle = ctypes.c_void_p()
            if not library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(handle)):
                found.append(handle)
        return cls(library, tuple(found))

    @property
    def names(self) -> tuple[str, ...]:
        """What each one is."""
        found = []
        for handle in self.handles:
            name = ctypes.create_string_buffer(NAME_BYTES)
            if not self.library.nvmlDeviceGetName(handle, name, ctypes.c_uint(NAME_BYTES)):
                found.append(name.value.decode(errors="replace"))
        return tuple(found)

    def joules(self) -> float | None:
        """What all of them have used since the driver was loaded; None where one does not count it."""
        if not self.handles:
            return None
        total = 0
        for handle in self.handles:
            milli = ctypes.c_ulonglong()
            if self.library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(milli)):
                return None
            total += milli.value
        return total / 1e3

    def used(self) -> int | None:
        """Bytes of memory in use on all of them; None where one does not say."""
        if not self.handles:
            return None
        total = 0
        for handle in self.handles:
            memory = _Memory()
            if self.library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
                return None
            total += memory.used
        return total


def _visible(count: int) -> list[int]:
    words = os.environ.get(VISIBLE, "").split(",")
    if all(word.strip().isdecimal() for word in words):
        return [int(word) for word in words if int(word) < count]
    return list(range(count))
