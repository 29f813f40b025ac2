"""An engine process that somebody holds on another host, as the server has it: its log, its end, its files.

One thread for each asks its holder what it wrote, and whether it runs. What it wrote goes into the server's
directory, as if it were here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vllm.config import VllmConfig

from taichi_serve.cluster.vllm.hosts.words import Begun, Offer, Order, Said
from taichi_serve.cluster.vllm.server.line import Line
from taichi_serve.cluster.vllm.server.process import Process, StartError
from taichi_serve.cluster.vllm.wire import flight_file

END_SECONDS = 60.0
WHAT = "an engine process on another host"


class GoneError(RuntimeError):
    """Whoever held it is gone, and so is it. The message says why."""


class Holding(Protocol):
    """A holder somewhere. All methods block, and raise GoneError."""

    def begin(self, order: Order) -> Begun:
        """Start it, or have it speak to this server from now on."""
        ...

    def keep(self, seconds: float) -> None:
        """It serves, and waits so long for another server where this one is gone."""
        ...

    def follow(self, at: int) -> Said:
        """What it wrote since, soon."""
        ...

    def signal(self, number: int) -> None:
        """Send its process a signal."""
        ...

    def kill(self) -> None:
        """End its group."""
        ...

    def end(self) -> bool:
        """End its group and take away what it left."""
        ...

    def leave(self) -> None:
        """Give its place back; the holder is gone then, and never raises."""
        ...


# Finds a place and a holder there. Asks from time to time whether it is still wanted; None where not.
Place = Callable[[Callable[[], bool]], Holding | None]


class Held:
    """A child (process.py) that a holder has. `told` hears of it when it is there."""

    def __init__(self, order: Order, directory: Path, place: Place, told: Callable[[Begun], None]) -> None:
        self.pid = 0
        self.sentinel, self._end = os.pipe2(os.O_CLOEXEC)
        self.torn = False  # its holder is gone
        self._order, self._directory, self._place, self._told = order, directory, place, told
        self._log = directory / f"{order.name}.log"
        self._log.write_bytes(b"")
        self._holding: Holding | None = None
        self._settled = threading.Event()
        self._over = threading.Event()
        self._code: int | None = None
        self._unwanted = threading.Event()
        self._following = threading.Thread(target=self._run, name=f"held-{order.name}", daemon=True)
        self._following.start()

    # ------------------------------------------------------------------------------------- what it is asked

    def known(self) -> bool:
        """Wait until it is there; False where it never will be."""
        self._settled.wait()
        return bool(self.pid)

    def poll(self) -> int | None:
        """The exit status, None while it runs or is awaited."""
        return self._code if self._over.is_set() else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once there is one. Raises subprocess.TimeoutExpired."""
        if not self._over.wait(timeout) or self._code is None:
            raise subprocess.TimeoutExpired(WHAT, timeout or 0.0)
        return self._code

    def send_signal(self, number: int) -> None:
        """To its process alone; one that is gone gets none."""
        self._ask(lambda holding: holding.signal(number))

    def keep(self, seconds: float) -> None:
        """It serves, and outlives its server by so much."""
        self._ask(lambda holding: holding.keep(seconds))

    def kill_group(self) -> None:
        """End its group now, or as soon as there is one; does not wait."""
        self._unwanted.set()
        if self._holding is None:
            self._settled.set()
        else:
            threading.Thread(target=self._ask, args=(lambda holding: holding.kill(),), daemon=True).start()

    def clear(self) -> bool:
        """Have what it left taken away, and its place given back."""
        gone: list[bool] = []
        self._ask(lambda holding: gone.append(holding.end()))
        if self._holding is not None:
            self._holding.leave()
        return all(gone)

    def close(self) -> None:
        """Nobody looks at the sentinel any more."""
        with contextlib.suppress(OSError):
            os.close(self.sentinel)

    def _ask(self, what: Callable[[Holding], object]) -> None:
        if self._holding is not None:
            with contextlib.suppress(GoneError):  # the thread hears of it, too
                what(self._holding)

    # ------------------------------------------------------------------------------------------ the thread's

    def _run(self) -> None:
        words, code = b"", -signal.SIGKILL
        try:
            self._holding = self._place(lambda: not self._unwanted.is_set())
            if self._holding is not None and self._unwanted.is_set():
                self._holding.leave()  # whoever would clear may have given up waiting
            elif self._holding is not None:
                begun = self._holding.begin(self._order)
                self._told(begun)
                self.pid = begun.pid
                self._settled.set()
                code = self._follow(self._holding)
        except GoneError as gone:
            # No request ended it. Those that go from one instance of a lost host to the next, which is not
            # known to be lost yet, would else be ended as if they had.
            words, self.torn = f"HostError: {gone}\n".encode(), True
        except Exception as wrong:  # noqa: BLE001  whoever waits for it has to hear of it
            words = f"HostError: {type(wrong).__name__}: {wrong}\n".encode()
        with contextlib.suppress(OSError), self._log.open("ab") as log:
            log.write(words)
        self._code = code
        self._over.set()
        self._settled.set()
        os.close(self._end)  # the sentinel can be read

    def _follow(self, holding: Holding) -> int:
        at = 0
        if self._unwanted.is_set():
            holding.kill()
        with self._log.open("ab", buffering=0) as log:
            while True:
                said = holding.follow(at)
                log.write(said.words)
                at += len(said.words)
                if said.code is not None:
                    if said.flight:
                        flight_file(self._directory, self._order.engine_id).write_bytes(said.flight)
                    return said.code


@dataclass(frozen=True, slots=True)
class Words:
    """What all processes of a server have in common: their command line, what their environments have beside
    their hosts', the name of their directories, and for how many seconds they outlive the server."""

    argv: list[str]
    env: dict[str, str]
    run: str
    keep: float


class HeldProcess(Process):
    """A process of an instance on another host."""

    def __init__(
        self,
        name: str,
        directory: Path,
        line: Line,
        place: Place,
        words: Words,
        told: Callable[[Begun], None],
        found: Offer | None = None,
    ) -> None:
        """`told` hears of it when it is there. One that was `found` serves already."""
        super().__init__(name, directory, line)
        assert line.keys is not None
        self.found, self._keep = found is not None, words.keep
        if found is not None:
            self.engine_id = found.engine_id
        its = directory.name, words.run, name, self.engine_id, line.handshake
        order = Order(*its, words.argv, words.env, line.keys)
        self._told = told
        self._held = self._process = Held(order, directory, place, self._begun)
        self.direct = set()  # by what it was asked (Engine.look_around)

    @property
    def torn(self) -> bool:
        """Whether its holder is gone."""
        return self._held.torn

    def wait_ready(self, config: VllmConfig) -> None:
        """Block until it is up. One that was found is so, and tells its client what a handshake would."""
        if not self.found:
            super().wait_ready(config)
        elif not self._held.known():
            raise StartError(f"instance {self.name} was found and cannot be had: {self.cause()}")

    def serves(self) -> None:
        """From here on it may outlive its server."""
        self._held.keep(self._keep)

    def _begun(self, begun: Begun) -> None:
        self.host = begun.host
        self._told(begun)

    def clear(self) -> bool:
        """On its host, and what was kept of it here but for its log."""
        gone = self._held.clear()
        self._process.close()
        flight_file(self.directory, self.engine_id).unlink(missing_ok=True)
        return gone
