"""Whether another process on this host still lives, and is the one it was.

A process number is given again. The file of a process under /proc that is held open is not: it is of this
process alone, and cannot be read once that is gone. A process on its way out says so before it gives up its
memory, so what was read before this says that it lives was its own.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

EXITING = 0x4  # PF_EXITING of Linux, among the flags of a task


class Life:
    """One process, from when it was met. `born` is what it says of itself (`born()`): another one may have
    got its number before it was met. Raises OSError where it is gone."""

    def __init__(self, pid: int, born: int | None = None) -> None:
        self._file = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        if not self.lives() or born not in (None, self._stat()[_BORN]):
            self.close()
            raise ProcessLookupError(f"process {pid} is not there any more")

    def lives(self) -> bool:
        """Microseconds."""
        try:
            stat = self._stat()
        except OSError:
            return False
        return stat[_STATE] not in (ord("Z"), ord("X")) and not stat[_FLAGS] & EXITING

    def _stat(self) -> list[int]:
        return _numbers(os.pread(self._file, 1024, 0))

    def close(self) -> None:
        """It is of no interest any more."""
        with contextlib.suppress(OSError):
            os.close(self._file)


# Of what follows the name, which is in brackets and may hold anything; see proc(5).
_STATE, _FLAGS, _BORN = 0, 6, 19


def _numbers(stat: bytes) -> list[int]:
    if not stat:
        raise ProcessLookupError("it is gone")
    words = stat[stat.rindex(b")") + 2 :].split()
    return [words[0][0], *(int(word) for word in words[1:])]


def born() -> int:
    """When this process began, in ticks since the machine did."""
    return _numbers(Path("/proc/self/stat").read_bytes())[_BORN]
