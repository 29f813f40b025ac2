"""A NIXL agent that two threads may use."""

from __future__ import annotations

import threading
from typing import Any


class Locked:
    """A NIXL agent for more than one thread: its calls come one after the other."""

    def __init__(self, nixl: Any) -> None:
        self._nixl = nixl
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._nixl, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            with self._lock:
                return found(*args, **options)

        self.__dict__[name] = call
        return call
