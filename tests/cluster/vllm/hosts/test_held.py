"""An engine process on another host, as the server has it."""

from __future__ import annotations

import select
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.curve import Keys, new_pair
from taichi_serve.cluster.vllm.hosts.held import GoneError, Held, Holding
from taichi_serve.cluster.vllm.hosts.words import Begun, Order, Said
from taichi_serve.cluster.vllm.wire import flight_file

KEYS = Keys("", new_pair(), new_pair(), [])
ORDER = Order("server", "run", "i0", "run-i0", "tcp://10.0.0.1:1", [], {}, KEYS)
SOON = 5.0


class Pretended:
    """A holder that says what it is told to say; None: it is gone."""

    def __init__(self) -> None:
        self.says: Queue[Said | None] = Queue()
        self.asked: list[str] = []
        self.killed, self.gone = threading.Event(), False

    def begin(self, order: Order) -> Begun:
        self.asked.append(f"begin {order.name}")
        return Begun(4711, "10.0.0.2", 0)

    def follow(self, at: int) -> Said:
        said = self.says.get()
        if said is None:
            self.gone = True
            raise GoneError("its node died")
        return said

    def keep(self, seconds: float) -> None:
        self.asked.append(f"keep {seconds:g}")

    def signal(self, number: int) -> None:
        self.asked.append(f"signal {number}")

    def kill(self) -> None:
        self.asked.append("kill")
        self.killed.set()

    def end(self) -> bool:
        if self.gone:
            raise GoneError("its node died")
        self.asked.append("end")
        return True

    def leave(self) -> None:
        self.asked.append("leave")


def held(directory: Path, holding: Holding | None, told: list[Begun] | None = None) -> Held:
    heard: Callable[[Begun], None] = (told if told is not None else []).append
    return Held(ORDER, directory, lambda wanted: holding, heard)


def readable(descriptor: int, seconds: float = SOON) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def test_it_is_known_when_it_has_begun_and_runs_until_it_is_said_to_have_ended(tmp_path: Path) -> None:
    holding, told = Pretended(), list[Begun]()
    one = held(tmp_path, holding, told)
    assert one.known()
    assert (one.pid, one.poll(), told) == (4711, None, [Begun(4711, "10.0.0.2", 0)])
    assert not readable(one.sentinel, 0)
    holding.says.put(Said(b"it loads\n"))
    holding.says.put(Said(b"it cannot\n", 3))
    assert readable(one.sentinel)
    assert (one.wait(SOON), one.poll(), one.torn) == (3, 3, False)
    assert (tmp_path / "i0.log").read_text() == "it loads\nit cannot\n"


def test_whose_prompts_it_computed_is_where_the_server_looks_before_its_end_is_known(tmp_path: Path) -> None:
    holding = Pretended()
    one = held(tmp_path, holding)
    holding.says.put(Said(b"", -9, b"a flight"))
    one.wait(SOON)
    assert flight_file(tmp_path, "run-i0").read_bytes() == b"a flight"


def test_a_node_that_dies_is_its_end_and_its_log_says_why(tmp_path: Path) -> None:
    holding = Pretended()
    one = held(tmp_path, holding)
    holding.says.put(None)
    assert one.wait(SOON) == -signal.SIGKILL
    assert (tmp_path / "i0.log").read_text() == "HostError: its node died\n"
    assert one.torn  # no request that was there is to blame
    assert one.clear()
    assert holding.asked == ["begin i0", "leave"]


def test_signals_reach_it_and_what_it_left_is_taken_away_where_it_was(tmp_path: Path) -> None:
    holding = Pretended()
    one = held(tmp_path, holding)
    one.known()
    one.send_signal(15)
    one.kill_group()
    assert holding.killed.wait(SOON)
    holding.says.put(Said(b"", -9))
    one.wait(SOON)
    one.clear()
    assert holding.asked == ["begin i0", "signal 15", "kill", "end", "leave"]


def test_who_is_not_wanted_any_more_stops_waiting_for_a_place(tmp_path: Path) -> None:
    asked = threading.Event()

    def place(wanted: Callable[[], bool]) -> Holding | None:
        while wanted():
            asked.set()
        return None

    one = Held(ORDER, tmp_path, place, lambda begun: None)
    assert asked.wait(SOON)
    one.kill_group()
    assert not one.known()
    assert one.wait(SOON) == -signal.SIGKILL
    assert one.clear()


def test_whose_place_comes_when_it_is_not_wanted_any_more_gives_it_back_and_never_begins(
    tmp_path: Path,
) -> None:
    holding, may = Pretended(), threading.Event()

    def place(wanted: Callable[[], bool]) -> Holding | None:
        may.wait(SOON)
        return holding

    one = Held(ORDER, tmp_path, place, lambda begun: None)
    one.kill_group()
    assert one.clear()  # who waited for its end did so for long enough
    may.set()
    assert one.wait(SOON) == -signal.SIGKILL
    assert holding.asked == ["leave"]


def test_who_is_killed_while_it_begins_is_killed_when_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding, begins, may = Pretended(), threading.Event(), threading.Event()

    def begin(order: Order) -> Begun:
        begins.set()
        may.wait(SOON)
        return Begun(4711, "10.0.0.2", 0)

    monkeypatch.setattr(holding, "begin", begin)
    one = held(tmp_path, holding)
    assert begins.wait(SOON)
    one.kill_group()
    may.set()
    assert holding.killed.wait(SOON)
    holding.says.put(Said(b"", -9))
    one.wait(SOON)


def test_its_end_is_waited_for_no_longer_than_is_said(tmp_path: Path) -> None:
    holding = Pretended()
    one = held(tmp_path, holding)
    with pytest.raises(subprocess.TimeoutExpired):
        one.wait(0.01)
    holding.says.put(Said(b"", 0))
    assert one.wait(SOON) == 0
