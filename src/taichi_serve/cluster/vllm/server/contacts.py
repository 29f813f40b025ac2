"""Whether a connection of an engine was lost and made anew. What was on its way is lost then, and ZeroMQ does
not say so.

Nobody but the processes of one incarnation can connect to the server's sockets for it (curve.py), and each of
them does so once. Who has done so twice has lost a connection. ZeroMQ's thread says that somebody has the key
before it hands on the first word that comes over the new connection: whoever takes a word and then finds
`again` false has all words before it.
"""

from __future__ import annotations

import itertools
from threading import Lock
from typing import Any

import zmq

_numbers = itertools.count()


class Contacts:
    """The sockets of one incarnation over TCP; those over files are not looked at."""

    def __init__(self) -> None:
        self._monitors: list[zmq.Socket[Any]] = []
        self._made: list[int] = []
        self._again = self._closed = False
        self._lock = Lock()  # whoever closes them is in another thread

    def watch(self, context: zmq.Context[Any], socket: zmq.Socket[Any]) -> None:
        """Count who connects to it. Before it is bound."""
        if self._closed:
            return
        address = f"inproc://contacts-{next(_numbers)}"
        socket.monitor(address, zmq.EVENT_HANDSHAKE_SUCCEEDED)
        # Not one of the context's own sockets: see curve.py.
        monitor = zmq.Context.shadow(context.underlying).socket(zmq.PAIR)
        monitor.linger = 0
        monitor.connect(address)
        with self._lock:
            self._monitors.append(monitor)
            self._made.append(0)

    @property
    def again(self) -> bool:
        """Whether somebody has connected to one of them for a second time."""
        if self._again or not self._monitors:
            return self._again
        with self._lock:
            for number, monitor in enumerate(self._monitors):
                self._made[number] += _waiting(monitor)
            self._again = any(made > 1 for made in self._made)
        return self._again

    def close(self) -> None:
        """Nobody asks any more. Before their contexts are ended."""
        with self._lock:
            self._closed = True
            for monitor in self._monitors:
                monitor.close()
            self._monitors, self._made = [], []


def _waiting(monitor: zmq.Socket[Any]) -> int:
    """How many events there are, which are taken out of it."""
    found = 0
    while monitor.getsockopt(zmq.EVENTS) & zmq.POLLIN:
        monitor.recv_multipart()
        found += 1
    return found
