"""Cores that are forked: each is what a program of its own would be, and none outlives who looks after it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from taichi_serve.cluster.vllm.server import forks
from taichi_serve.cluster.vllm.server.forks import Forked, Forks, Spawned

HERE = Path(__file__).parent
SOURCE = Path(forks.__file__).parents[4]
SECONDS = 20.0
TELL = """
import json, os, random, resource, signal, sys
import numpy
said = {
    "env": dict(os.environ), "group": os.getpgid(0), "pid": os.getpid(),
    "argv": sys.argv[1:], "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "open": {f: os.readlink(f"/proc/self/fd/{f}") for f in os.listdir("/proc/self/fd") if int(f) < 3},
    "more": [f for f in os.listdir("/proc/self/fd") if int(f) >= 3],
    "chance": [random.random(), float(numpy.random.random())],
    "signals": [signal.getsignal(n).name for n in (signal.SIGTERM, signal.SIGCHLD)],
}
print(json.dumps(said), flush=True)
"""
STAY = "import time; time.sleep(600)"


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork servers without vLLM."""
    monkeypatch.setattr(forks, "FORK_SERVER", "forkable")
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}:{HERE}")


@pytest.fixture
def cores(tmp_path: Path) -> Iterator[Cores]:
    those = Cores(tmp_path)
    yield those
    those.forks.close()


class Cores:
    """Forks what it is given the text of."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.forks = directory, Forks()
        self.count = 0

    def begin(self, text: str, **env: str) -> Forked:
        self.count += 1
        spec = self.directory / f"i{self.count}.json"
        spec.write_text(text)
        return self.forks.begin(spec, self.log(), {**os.environ, **env})

    def log(self) -> Path:
        """That of the last one."""
        return self.directory / f"i{self.count}.log"

    def told(self, **env: str) -> dict[str, Any]:
        """What a core says of itself."""
        assert self.begin(TELL, **env).wait(SECONDS) == 0
        found: dict[str, Any] = json.loads(self.log().read_text())
        return found

    def running(self) -> Forked:
        """A core that stays."""
        core = self.begin(STAY)
        assert core.known()
        return core


def eventually(holds: Callable[[], Any]) -> bool:
    until = time.monotonic() + SECONDS
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(holds())


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_it_has_the_environment_that_it_was_given_and_no_other(cores: Cores) -> None:
    cores.forks.preload()
    os.environ["SAID_LATER"] = "1"
    try:
        found = cores.told(ONLY_HERE="äöü\udcff=")["env"]
    finally:
        del os.environ["SAID_LATER"]
    assert found == {**os.environ, "SAID_LATER": "1", "ONLY_HERE": "äöü\udcff="}
    assert "SAID_LATER" not in cores.told()["env"]


def test_it_leads_a_group_and_has_nothing_open_but_its_log(cores: Cores) -> None:
    cores.running()
    before = cores.told()
    said = cores.told()
    assert said["group"] == said["pid"]
    log = str(cores.log())
    assert said["open"] == {"0": "/dev/null", "1": log, "2": log}
    assert len(said["more"]) == 1, "the directory that it lists, and no socket of whoever forked it"
    assert said["signals"] == ["SIG_DFL", "SIG_DFL"]
    assert said["argv"] == [str(cores.directory / f"i{cores.count}.json")]
    assert not set(said["chance"]) & set(before["chance"]), "each has a chance of its own"


def test_it_may_have_as_many_files_open_as_the_server_by_then(cores: Cores) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    cores.forks.preload()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] - 1, before[1]))
        assert cores.told()["files"] == [before[0] - 1, before[1]]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_it_is_called_as_the_program_is(cores: Cores) -> None:
    core = cores.running()
    title = f"{sys.executable} -m {forks.CORE} {cores.directory / 'i1.json'}"
    assert eventually(lambda: " ".join(psutil.Process(core.pid).cmdline()) == title)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("print('fine')", 0, "fine"),
        ("raise SystemExit(3)", 3, ""),
        ("raise ValueError('no such model')", 1, "ValueError: no such model"),
        ("import os; os._exit(7)", 7, ""),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM, ""),
    ],
)
def test_how_it_ends_is_known_and_what_it_says_is_in_its_log(
    text: str, code: int, says: str, cores: Cores
) -> None:
    core = cores.begin(text)
    assert core.wait(SECONDS) == core.poll() == code
    assert says in cores.log().read_text()


def test_its_end_can_be_asked_for_as_soon_as_it_can_be_seen(cores: Cores) -> None:
    core = cores.running()
    assert core.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        core.wait(0.01)
    core.kill_group()
    assert forks.ended(core.sentinel, SECONDS)
    assert core.poll() == -signal.SIGKILL
    core.send_signal(signal.SIGTERM)  # nobody gets it
    core.kill_group()


def test_its_whole_group_is_killed_with_it(cores: Cores) -> None:
    core = cores.begin("import subprocess; subprocess.run(['sleep', '600'])")
    assert core.known()
    assert eventually(lambda: psutil.Process(core.pid).children())
    (below,) = psutil.Process(core.pid).children()
    core.kill_group()
    assert core.wait(SECONDS) == -signal.SIGKILL
    assert eventually(lambda: gone(below.pid))


def test_a_fork_server_that_is_killed_takes_its_cores_along_and_the_next_core_has_another(
    cores: Cores,
) -> None:
    core, log = cores.running(), cores.log()
    server = cores.forks.server
    assert server is not None
    os.kill(server.pid, signal.SIGKILL)
    assert core.wait(SECONDS) == -signal.SIGKILL
    assert gone(core.pid)
    assert log.read_text() == "ForkServerError: its fork server ended first, killed by SIGKILL\n"
    assert cores.told()
    assert cores.forks.server is not server


def test_a_server_that_is_killed_takes_all_along(tmp_path: Path) -> None:
    (tmp_path / "spec").write_text(STAY)
    text = f"""
import os, time
from pathlib import Path
from taichi_serve.cluster.vllm.server import forks
forks.FORK_SERVER = "forkable"
its = forks.Forks()
core = its.begin(Path({str(tmp_path / "spec")!r}), Path({str(tmp_path / "log")!r}), os.environ)
assert core.known()
print(core.pid, its.server.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pids = [int(word) for word in server.stdout.readline().split()]
        assert len(pids) == 2 and not any(map(gone, pids))
        server.kill()
    assert eventually(lambda: all(map(gone, pids)))


def test_the_end_of_the_fork_server_leaves_nothing(cores: Cores) -> None:
    core = cores.running()
    server = cores.forks.server
    assert server is not None
    cores.forks.close()
    assert core.wait(SECONDS) == -signal.SIGKILL
    assert gone(core.pid) and gone(server.pid)
    assert sorted(path.name for path in cores.directory.iterdir()) == ["i1.json", "i1.log"]


def test_ctrl_c_is_nothing_to_a_fork_server(cores: Cores) -> None:
    core = cores.running()
    assert cores.forks.server is not None
    os.kill(cores.forks.server.pid, signal.SIGINT)
    assert cores.told()
    assert core.poll() is None


def test_what_cannot_be_imported_is_in_the_log_of_the_core(
    cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORKABLE_MODULES", "no_such_module")
    core = cores.begin(STAY)
    assert not core.known()
    assert core.wait(SECONDS) == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'" in cores.log().read_text()


def test_what_runs_threads_is_not_forked(cores: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORKABLE_MODULES", "threaded")
    assert cores.begin(STAY).wait(SECONDS) == 1
    assert "RuntimeError: it cannot be forked: what it imported runs threads" in cores.log().read_text()


def test_a_kernel_that_does_not_fork_is_one_clear_error(
    cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORKABLE_FULL", "1")
    core = cores.begin(STAY)
    assert not core.known()
    assert core.wait(SECONDS) == 1
    assert cores.log().read_text() == "OSError: fork: too many processes\n"


def test_an_environment_that_is_too_large_is_one_clear_error(cores: Cores) -> None:
    cores.running()
    assert cores.begin(STAY, LARGE="x" * (1 << 17)).wait(SECONDS) == 1
    assert cores.log().read_text() == "OSError: [Errno 90] Message too long\n"
    assert cores.told()


def test_what_is_not_wanted_any_more_is_not_waited_for(cores: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORKABLE_MODULES", "endless")
    one, other = cores.begin(STAY), cores.begin(STAY)
    one.kill_group()
    assert one.poll() is None, "the other one is still wanted"
    other.kill_group()
    assert one.wait(SECONDS) == other.wait(SECONDS) == -signal.SIGKILL
    assert not one.known()


def test_what_is_not_wanted_any_more_ends_as_soon_as_it_is_there(cores: Cores) -> None:
    wanted = cores.running()
    other = cores.begin(STAY)
    other.kill_group()
    assert other.wait(SECONDS) == -signal.SIGKILL
    assert wanted.poll() is None


def test_nobody_waits_for_a_fork_server_that_stands_still(cores: Cores) -> None:
    wanted = cores.running()
    assert cores.forks.server is not None
    os.kill(cores.forks.server.pid, signal.SIGSTOP)
    late = cores.begin(STAY)
    late.kill_group()
    assert not late.known()
    os.kill(cores.forks.server.pid, signal.SIGCONT)
    assert late.wait(SECONDS) == -signal.SIGKILL
    assert wanted.poll() is None


def test_a_program_of_its_own_is_asked_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "CORE", "runpy")
    spec, log = tmp_path / "spec", tmp_path / "log"
    core = Spawned(spec, log, os.environ)
    assert core.known()
    core.kill_group()
    assert core.wait(SECONDS) in (1, -signal.SIGKILL)
    assert forks.ended(core.sentinel, SECONDS)
    core.close()
