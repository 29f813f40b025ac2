"""What is known of a process that was begun, on whichever host."""

from __future__ import annotations

from typing import Protocol


class Child(Protocol):
    """Of this host (forked.py, spawned.py), or of another one (hosts/held.py)."""

    @property
    def pid(self) -> int:
        """Its number where it runs; 0 as long as it has none."""
        ...

    @property
    def sentinel(self) -> int:
        """A descriptor that can be read when it has ended."""
        ...

    def known(self) -> bool:
        """Wait until it is there; False where it never will be."""
        ...

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once there is one. Raises subprocess.TimeoutExpired."""
        ...

    def send_signal(self, number: int) -> None:
        """To this process alone."""
        ...

    def kill_group(self) -> None:
        """End its whole process group, and do not wait for it."""
        ...

    def close(self) -> None:
        """Nobody looks at the sentinel any more."""
        ...
