"""A server that cannot start says why in one clear line, exits with an error, and leaves no process."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import STOP_SECONDS, Server, eventually

from taichi_serve.latency.profile import Fit, Profile, save


@dataclass(frozen=True)
class Failing:
    """Flags that cannot work, the exit code, and words that the line must have."""

    flags: tuple[str, ...]
    code: int
    says: tuple[str, ...]
    model: str | None = None


CASES = {
    "the model path is missing": Failing((), 1, ("/nowhere/at/all",), model="/nowhere/at/all"),
    "the port is taken": Failing(("--port", "{taken}"), 1, ("{taken}", "in use")),
    "there is not enough memory": Failing(
        ("--kv-cache-memory-bytes", str(1 << 46)), 1, ("i0", ".log", "memory")
    ),
    "a flag is unknown": Failing(("--no-such-flag",), 2, ("--no-such-flag",)),
    "no instances": Failing(("--d-heavy", "0"), 2, ("at least one instance",)),
    "nobody who could prefill": Failing(("--d-heavy", "2", "--d-chunk", "0"), 2, ("nobody could prefill",)),
    "chunks the wrong way round": Failing(("--p-heavy", "1", "--p-chunk", "8"), 2, ("must not be below",)),
    "a chunk above the step budget": Failing(
        ("--d-chunk", "2048", "--max-num-batched-tokens", "512"), 1, ("2048", "--max-num-batched-tokens")
    ),
    "an SLO that is no time": Failing(("--ttft-slo", "0"), 2, ("ttft",)),
    "a flag of vLLM that contradicts us": Failing(
        ("--data-parallel-size", "2", "--d-heavy", "3"), 2, ("--data-parallel-size 2", "--d-heavy 3")
    ),
    "the profile is torn": Failing(("--profile", "{torn}"), 2, ("{torn}", "not JSON")),
    "the profile is of another model": Failing(
        ("--profile", "{other}"), 2, ("{other}", "model", "the profile is of somebody/large")
    ),
    "devices for one of two": Failing(("--d-heavy", "2", "--devices", "0"), 1, ("--devices", "2 instances")),
}


@dataclass
class Started:
    """A server that is going to fail, and every process that was ever seen below it."""

    server: Server
    seen: set[psutil.Process]
    words: dict[str, str]  # what stands for a name in braces


def _profiles(directory: Path) -> dict[str, str]:
    """Two that cannot be used: half a file, and one of another model."""
    torn, other = directory / "torn.json", directory / "other.json"
    torn.write_text('{"schema": 1, "mod')
    fit = Fit(0.004, 0.0, 1e-5, 0.0, 1e-4, 1e-8, 64, 0.03, 0.1)
    save(Profile(1, "somebody/large", "one core", {}, {}, 100_000, 4096, [], fit), other)
    return {"torn": str(torn), "other": str(other)}


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Started]]:
    """All of them, side by side, watched until they have ended."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        words = {"taken": str(listener.getsockname()[1]), **_profiles(tmp_path_factory.mktemp("profiles"))}
        started = {}
        for number, (why, case) in enumerate(CASES.items()):
            flags = [flag.format(**words) for flag in case.flags]
            server = Server(tmp_path_factory.mktemp(f"failing{number}"), *flags, model=case.model)
            started[why] = Started(server, set(), words)
        try:
            eventually(lambda: _all_over(started.values()), 400, "all have ended")
            yield started
        finally:
            for one in started.values():
                one.server.end()


def _all_over(started: Any) -> bool:
    over = True
    for one in started:
        if one.server.process.poll() is None:
            over = False
            try:
                one.seen.update(one.server.family())
            except psutil.NoSuchProcess:
                continue
    return over


@pytest.mark.parametrize("why", CASES)
def test_one_clear_line_an_exit_code_and_no_orphan_when(why: str, failing: dict[str, Started]) -> None:
    case, one = CASES[why], failing[why]
    said = one.server.said()
    assert one.server.process.returncode == case.code, said[-3000:]
    line = said.strip().splitlines()[-1]
    for word in case.says:
        assert word.format(**one.words) in line, said[-3000:]
    assert "Traceback" not in said, said[-3000:]
    _, alive = psutil.wait_procs(list(one.seen), timeout=5)
    assert not alive


def test_the_log_that_a_start_error_names_is_still_there(failing: dict[str, Started]) -> None:
    said = failing["there is not enough memory"].server.said()
    named = next(word for word in said.split() if word.strip(";,.").endswith(".log"))
    assert Path(named.strip(";,.")).stat().st_size > 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=str
)
def test_a_signal_during_the_start_leaves_no_process(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    server = Server(tmp_path, "--d-heavy", "1")
    try:
        eventually(lambda: list(tmp_path.glob("taichi-*/i0.log")), 200, "an engine is starting")
        family = server.family()
        server.signal(number)
        assert server.process.wait(STOP_SECONDS) == code, server.said()[-3000:]
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
        assert "Traceback" not in server.said()
    finally:
        server.end()
