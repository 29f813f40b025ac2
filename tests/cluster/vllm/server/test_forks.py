"""Cores that are forked: each is what a program of its own would be, and none outlives who looks after it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cores import HERE, SECONDS, SOURCE, STAY, Cores, eventually, gone

from taichi_serve.cluster.vllm.server import forked, forks, spawned
from taichi_serve.cluster.vllm.server.spawned import CORE, Spawned, ended

BLOCKED = "import os, signal; n = [signal.SIGUSR1]; signal.pthread_sigmask(signal.SIG_BLOCK, n)"


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
    title = f"{sys.executable} -m {CORE} {cores.directory / 'i1.json'}"
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
    assert ended(core.sentinel, SECONDS)
    assert core.poll() == -signal.SIGKILL
    core.send_signal(signal.SIGTERM)  # nobody gets it
    core.kill_group()


def test_it_can_be_asked_to_stop_as_soon_as_it_can_be_seen(cores: Cores) -> None:
    for _ in range(20):
        core = cores.running()
        core.send_signal(signal.SIGTERM)
        assert core.wait(SECONDS) == -signal.SIGTERM


def test_its_whole_group_is_killed_with_it(cores: Cores) -> None:
    core = cores.begin("import subprocess; subprocess.run(['sleep', '600'])")
    assert core.known()
    assert eventually(lambda: psutil.Process(core.pid).children())
    (below,) = psutil.Process(core.pid).children()
    core.kill_group()
    assert core.wait(SECONDS) == -signal.SIGKILL
    assert eventually(lambda: gone(below.pid))


def test_a_server_that_is_killed_takes_all_along(tmp_path: Path) -> None:
    (tmp_path / "spec").write_text(STAY)
    text = f"""
import os, time
from pathlib import Path
from taichi_serve.cluster.vllm.server import forks
forks.FORK_SERVER = "forkable"
its = forks.Forks(Path({str(tmp_path)!r}), print)
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
    server = cores.server()
    cores.forks.close()
    assert core.wait(SECONDS) == -signal.SIGKILL
    assert gone(core.pid) and gone(server.pid)
    assert sorted(path.name for path in cores.directory.iterdir()) == ["i1.json", "i1.log"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whoever_stops_a_whole_control_group_takes_no_core_along(
    number: signal.Signals, cores: Cores
) -> None:
    core = cores.running()
    os.kill(cores.server().pid, number)
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


@pytest.mark.parametrize("daemon", ["yes", "no"])
def test_what_runs_threads_is_not_forked_and_they_are_named(
    daemon: str, cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORKABLE_MODULES", "threaded")
    monkeypatch.setenv("THREADED_DAEMON", daemon)
    core = cores.begin(STAY)
    assert core.wait(SECONDS) == 1
    why = "what Python imports here runs threads (eternal)"
    assert f"ThreadsError: {why}\n" in cores.log().read_text()
    assert core.forsaken == why


def test_threads_that_are_there_from_the_beginning_are_seen_before_anything_is_imported(
    cores: Cores, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import threaded\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{SOURCE}:{HERE}")
    monkeypatch.setenv("FORKABLE_MODULES", "endless")
    core = cores.begin(STAY)
    assert core.wait(SECONDS) == 1
    assert core.forsaken == "what Python imports here runs threads (eternal)"


@pytest.mark.parametrize("what", ["fork", "pidfd_open"])
def test_a_kernel_that_does_not_fork_is_one_clear_error(
    what: str, cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORKABLE_FORBIDDEN", what)
    core = cores.begin(STAY)
    assert not core.known()
    assert core.wait(SECONDS) == 1
    assert cores.log().read_text() == "OSError: fork: [Errno 1] not permitted\n"
    assert core.forsaken == "OSError: fork: [Errno 1] not permitted"
    assert cores.server().gone is None
    assert psutil.Process(cores.server().pid).children() == janitors(cores), "and no child is left"


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


def test_nobody_waits_for_a_fork_server_that_stands_still(
    cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forked, "FORK_SECONDS", 0.1)
    wanted = cores.running()
    os.kill(cores.server().pid, signal.SIGSTOP)
    late = cores.begin(STAY)
    assert not late.known()
    assert late.forsaken == "its fork server has not answered for 0.2 s"
    late.kill_group()
    late.close()
    os.kill(cores.server().pid, signal.SIGCONT)
    assert late.wait(SECONDS) == -signal.SIGKILL
    assert wanted.poll() is None


@pytest.mark.parametrize(("end", "code"), [("os._exit(7)", 7), ("os.kill(os.getpid(), 9)", -9)])
def test_an_end_is_known_although_the_fork_server_stands_still(
    end: str, code: int, cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forked, "WORD_SECONDS", 0.1)
    core = cores.begin(f"{BLOCKED}; print(1, flush=True); signal.sigwait(n); {end}")
    assert eventually(cores.log().read_text)
    os.kill(cores.server().pid, signal.SIGSTOP)
    core.send_signal(signal.SIGUSR1)
    assert core.wait(SECONDS) == code
    os.kill(cores.server().pid, signal.SIGCONT)
    assert eventually(lambda: not psutil.pid_exists(core.pid))
    assert core.poll() == code


def test_one_that_is_given_up_ends_with_its_last_core(cores: Cores) -> None:
    one, other = cores.running(), cores.running()
    server = cores.server()
    cores.forks.give_up("of a test")
    one.kill_group()
    assert one.wait(SECONDS) == -signal.SIGKILL
    assert server.gone is None and other.poll() is None
    other.kill_group()
    assert other.wait(SECONDS) == -signal.SIGKILL
    assert eventually(lambda: gone(server.pid))


def test_a_number_that_is_somebody_elses_by_now_is_not_killed(cores: Cores) -> None:
    core = cores.running()
    core.kill_group()
    assert core.wait(SECONDS) == -signal.SIGKILL
    with subprocess.Popen(["sleep", "600"], process_group=0) as other:
        core.pid = other.pid
        core.kill_group()
        assert other.poll() is None
        other.kill()


def janitors(cores: Cores) -> list[psutil.Process]:
    """Those of the fork server."""
    children = psutil.Process(cores.server().pid).children()
    return [child for child in children if child.cmdline()[-1].endswith("(janitor)")]


def test_a_server_that_is_killed_before_there_is_a_core_leaves_no_directory(tmp_path: Path) -> None:
    directory = tmp_path / "server"
    directory.mkdir()
    (directory / "spec").write_text(STAY)
    text = f"""
import os, time
from pathlib import Path
from taichi_serve.cluster.vllm.server import forks
forks.FORK_SERVER = "forkable"
its = forks.Forks(Path({str(directory)!r}), print)
core = its.begin(Path({str(directory / "spec")!r}), Path({str(directory / "log")!r}), os.environ)
print(its.server.pid, flush=True)
time.sleep(600)
"""
    env = {**os.environ, "FORKABLE_MODULES": "endless"}
    with subprocess.Popen([sys.executable, "-c", text], env=env, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert eventually(lambda: psutil.Process(pid).children())
        (janitor,) = psutil.Process(pid).children()
        server.kill()
    assert eventually(lambda: not directory.exists())
    assert eventually(lambda: gone(pid) and gone(janitor.pid))


def test_the_janitor_of_a_fork_server_ends_with_it_and_takes_nothing_from_a_server_that_lives(
    cores: Cores,
) -> None:
    cores.running()
    (janitor,) = janitors(cores)
    assert not [f for f in janitor.open_files() if f.fd > 2]
    assert len(list(Path(f"/proc/{janitor.pid}/fd").iterdir())) == 5, "0 to 2, and those whom it watches"
    cores.forks.close()
    assert eventually(lambda: gone(janitor.pid))
    assert sorted(path.name for path in cores.directory.iterdir()) == ["i1.json", "i1.log"]


def test_a_program_of_its_own_is_asked_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawned, "CORE", "runpy")
    spec, log = tmp_path / "spec", tmp_path / "log"
    core = Spawned(spec, log, os.environ)
    assert core.known()
    core.kill_group()
    assert core.wait(SECONDS) in (1, -signal.SIGKILL)
    assert ended(core.sentinel, SECONDS)
    core.close()
