"""What is not essential fails: it is counted, told once, and the decisions go their way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("prometheus_client")  # it comes with vLLM

from prometheus_client import CollectorRegistry, generate_latest

from taichi_serve.eventlog import EventLog, read
from taichi_serve.frontend import metrics
from taichi_serve.frontend.ending import Ending
from taichi_serve.frontend.metrics import TaichiCollector
from taichi_serve.frontend.record import Recorder
from taichi_serve.frontend.trouble import Trouble
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import Arrived, Event, Finished, Prefill, Prefilled
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO


def recorder(said: list[str], write: Any = None) -> Recorder:
    capacities = {"i0": 100_000, "i1": 100_000}
    scheduler = GlobalScheduler(Sliders(1, 1, 1024, 256), SLO(4.0, 0.07), Learned(), Policy(), capacities)
    return Recorder(scheduler, 2048, write, Trouble(said.append))


def life(name: str) -> list[Event]:
    return [Arrived(0.0, name, 100, 5), Prefilled(1.0, name, 0, "i1"), Finished(1.6, name, 5)]


def serves(here: Recorder, requests: int = 200) -> bool:
    """Whether every request gets its place."""
    commands = [c for n in range(requests) for fact in life(f"r{n}") for c in here.on(fact)]
    return [type(c) for c in commands] == [Prefill] * requests


def test_an_event_log_on_a_full_disk_is_told_once_and_serving_goes_on() -> None:
    said: list[str] = []
    log = EventLog(Path("/dev/full"))
    here = recorder(said, log.write)
    assert serves(here)
    (line,) = said
    assert line.startswith("event log: [Errno 28] No space left on device; serving goes on, and taichi_tro")
    assert here.trouble.counts["event log"] > 1
    here.on(life("last")[0])
    here.trouble.guarded("event log", log.close)()  # the rest cannot be written either
    assert len(said) == 1


class HalfFull:
    """A file on a disk that has room for `room` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, text: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = min(self.room, len(text))
        self.room -= taken
        return int(self.file.write(text[:taken]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_log_is_still_readable_when_the_disk_had_no_room_for_a_while(tmp_path: Path) -> None:
    log, path = EventLog(tmp_path / "events.jsonl"), tmp_path / "events.jsonl"
    event = life("a")[0]
    log.write(event, ())
    log.flush()
    log._file = HalfFull(log._file, 20)  # type: ignore[assignment]
    log.write(event, ())
    with pytest.raises(OSError, match="No space left"):
        log.flush()
    log._file.room = 1 << 20  # type: ignore[attr-defined]
    log.write(event, ())
    log.close()
    assert list(read(path.read_text().splitlines(keepends=True))) == [(event, ())] * 2


def test_a_log_goes_on_where_an_earlier_server_ended(tmp_path: Path) -> None:
    for _ in range(2):
        log = EventLog(tmp_path / "events.jsonl")
        for event in life("a"):
            log.write(event, ())
        log.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
    assert [event for event, _ in read(lines)] == life("a") * 2


def test_a_listener_that_fails_changes_no_decision() -> None:
    def listener(event: Event, commands: object) -> None:
        raise KeyError("nobody")

    said: list[str] = []
    here = recorder(said, listener)
    assert serves(here)
    assert here.trouble.counts["event log"] == 600
    assert len(said) == 1


def test_a_memory_that_fails_changes_no_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    here = recorder(said)
    monkeypatch.setattr(here, "histories", None)
    assert serves(here)
    assert here.trouble.counts["record"] == 600
    assert said[0].startswith("record: ")


def scraped(here: Recorder) -> str:
    registry = CollectorRegistry()
    cluster = SimpleNamespace(engines=[])
    front = SimpleNamespace(processes=list)
    elastic = SimpleNamespace(counts={})
    more: Any = {"cluster": cluster, "elastic": elastic, "front": front, "tuner": None, "classes": {}}
    system: Any = SimpleNamespace(scheduler=here.scheduler, recorder=here, **more)
    registry.register(TaichiCollector(system))
    return generate_latest(registry).decode()


def test_a_part_of_a_scrape_that_raises_takes_no_other_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(recorder: Recorder) -> Iterator[Any]:
        yield from ()
        raise RuntimeError("a move of no kind")

    said: list[str] = []
    here = recorder(said)
    assert 'taichi_trouble_total{what="metrics"} 0.0' in scraped(here)
    monkeypatch.setattr(metrics, "_moves", raises)
    shown = scraped(here)
    assert "taichi_moves_total" not in shown
    assert 'taichi_alive{engine="1"} 1.0' in shown
    assert "taichi_backflow_rate 0.0" in shown
    assert here.trouble.counts["metrics"] > 0
    assert f'taichi_trouble_total{{what="metrics"}} {here.trouble.counts["metrics"]}.0' in shown
    assert len(said) == 1


def test_what_is_guarded_gives_what_it_gives() -> None:
    trouble = Trouble(lambda text: None)
    assert trouble.guarded("record", lambda a, b=2: a + b)(1) == 3
    with pytest.raises(asyncio.CancelledError):  # who ends a task is no trouble
        trouble.guarded("record", raise_cancelled)()


def raise_cancelled() -> None:
    raise asyncio.CancelledError


def test_only_an_end_that_was_asked_for_has_exit_code_0() -> None:
    assert (Ending().status(asked=True), Ending().words) == (0, "stopped")
    alone = Ending()
    assert alone.status(asked=False) == 3
    assert alone.words == "stopped: nobody asked for it"
    failed = Ending()
    failed.fail("the scheduler failed")
    failed.fail("every instance is gone")
    assert failed.status(asked=True) == 3  # the signal was our own
    assert failed.words == "stopped: the scheduler failed"
