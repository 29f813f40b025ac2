"""The agent between vLLM's connector and NIXL: which reads it takes on itself, and when sources may free
blocks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from taichi_serve.cluster.vllm.wire import direct
from taichi_serve.cluster.vllm.worker.host import HostAgent, Rows
from taichi_serve.cluster.vllm.worker.life import Life, born

ROWS = np.array([[1000, 64, 0], [2000, 64, 0]], dtype=np.uint64)


class Nixl:
    """NIXL as far as it is asked: it keeps what it is told."""

    name = "agent-1"

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.news: dict[str, list[bytes]] = {}
        self.prepared: list[tuple[tuple[int, ...], str | None]] = []

    def get_reg_descs(self, ranges: Any, kind: str) -> Any:
        return ranges

    def register_memory(self, descs: Any) -> str:
        return "registered"

    def add_remote_agent(self, metadata: bytes) -> bytes:
        return metadata

    def remove_remote_agent(self, agent: str) -> None:
        self.told.append(("removed", agent))

    def get_xfer_descs(self, rows: Any, kind: str) -> Any:
        return rows

    def prep_xfer_dlist(self, agent: str, descs: Any, mem_type: str | None = None) -> str:
        self.prepared.append((np.asarray(descs).shape, mem_type))
        return f"list of {agent}"

    def make_prepped_xfer(self, way: str, *lists: Any, notif_msg: bytes = b"") -> str:
        return "a transfer of NIXL's"

    def transfer(self, handle: str) -> str:
        return "PROC"

    def send_notif(self, agent: str, notif_msg: bytes) -> None:
        self.told.append(("note", agent, notif_msg))

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        news, self.news = self.news, {}
        return news


class Done:
    def done(self) -> bool:
        return True


class Reachable:
    """Memory whose copies are over at once; without `lets` it refuses to be reached."""

    def __init__(self, lets: bool = True) -> None:
        self.lets = lets
        self.copied: list[tuple[list[int], list[int], bool]] = []
        self.left: list[str] = []

    def offer(self, ranges: Rows) -> list[dict[str, Any]]:
        return [{"address": int(a)} for a in ranges[:, 0]]

    def reach(self, peer: dict[str, Any], rows: Rows) -> NDArray[np.uint64]:
        if not self.lets:
            raise OSError("not permitted")
        return rows[:, 0] + 7

    def copy(self, peer: dict[str, Any], target: Rows, source: NDArray[np.uint64], in_step: bool) -> Done:
        self.copied.append((target[:, 0].tolist(), source.tolist(), in_step))
        return Done()

    def leave(self, peer: dict[str, Any]) -> None:
        self.left.append(peer["engine_id"])


class Pair:
    """Our agent of engine e1, which has met the agent of e0."""

    def __init__(self, directory: Path, memory: Reachable | None, pid: int = 0) -> None:
        pid = pid or os.getpid()
        self.nixl, self.directory = Nixl(), directory
        self.agent = HostAgent(self.nixl, directory, memory, "e1", 0)
        self.agent.get_reg_descs([(1000, 64, 0)], "DRAM")
        self.agent.register_memory("all")
        (directory / "kv-agent-0.json").write_text(json.dumps({"pid": pid, "engine_id": "e0", "memory": []}))
        assert self.agent.add_remote_agent(b"agent-0") == "agent-0"
        self.mine = self.agent.prep_xfer_dlist("", self.agent.get_xfer_descs(ROWS, "DRAM"))
        self.theirs = self.agent.prep_xfer_dlist("agent-0", self.agent.get_xfer_descs(ROWS, "DRAM"))

    def read(self, note: bytes) -> Any:
        handle = self.agent.make_prepped_xfer("READ", self.mine, [1], self.theirs, [0], notif_msg=note)
        self.agent.transfer(handle)
        return handle


def test_a_peer_of_the_same_server_is_read_directly_and_told_when_the_last_byte_is_here(
    tmp_path: Path,
) -> None:
    memory = Reachable()
    pair = Pair(tmp_path, memory)
    assert direct(tmp_path, "e1", "e0")
    assert pair.agent.check_xfer_state(pair.read(b"a:1")) == "DONE"
    assert memory.copied == [([2000], [1007], False)]
    assert pair.nixl.told == [("note", "agent-0", b"a:1")]


def test_lists_that_vllm_prepares_from_rows_of_five_columns_are_read_block_by_block(tmp_path: Path) -> None:
    """As since 0.33, which gives NIXL one row for all blocks of a region: here ten of 64 bytes."""
    memory = Reachable()
    pair = Pair(tmp_path, memory)
    region = np.array([[1000, 64, 0, 64, 10]], dtype=np.uint64)
    pair.mine = pair.agent.prep_xfer_dlist("NIXL_INIT_AGENT", region, mem_type="DRAM")
    far = np.array([[9000, 64, 0, 64, 10]], dtype=np.uint64)
    pair.theirs = pair.agent.prep_xfer_dlist("agent-0", far, mem_type="DRAM")
    assert pair.nixl.prepared[-2:] == [((1, 5), "DRAM"), ((1, 5), "DRAM")]
    handle = pair.agent.make_prepped_xfer("READ", pair.mine, [1, 9], pair.theirs, [0, 3])
    pair.agent.transfer(handle)
    assert memory.copied == [([1064, 1576], [9007, 9199], False)]
    assert pair.agent.check_xfer_state(handle) == "DONE"
    assert pair.agent.get_xfer_telemetry(handle).totalBytes == 128


def test_what_is_only_copied_ahead_is_no_word_to_the_source(tmp_path: Path) -> None:
    pair = Pair(tmp_path, Reachable())
    assert pair.agent.check_xfer_state(pair.read(b"")) == "DONE"
    assert pair.nixl.told == []


def test_a_read_within_a_step_is_one_that_the_step_waits_for(tmp_path: Path) -> None:
    memory = Reachable()
    pair = Pair(tmp_path, memory)
    with pair.agent.within_step():
        pair.read(b"a:1")
    assert [in_step for _, _, in_step in memory.copied] == [True]


@pytest.mark.parametrize("memory", [None, Reachable(lets=False)])
def test_without_memory_or_where_the_host_refuses_it_goes_over_nixl(
    tmp_path: Path, memory: Reachable | None
) -> None:
    pair = Pair(tmp_path, memory)
    assert pair.read(b"a:1") == "a transfer of NIXL's"
    assert not direct(tmp_path, "e1", "e0")


def test_the_memory_of_a_lost_engine_is_let_go_and_nobody_reads_it_any_more(tmp_path: Path) -> None:
    memory = Reachable()
    pair = Pair(tmp_path, memory)
    pair.agent.forget("e0")
    assert memory.left == ["e0"]
    assert not direct(tmp_path, "e1", "e0")
    with pytest.raises(KeyError):
        pair.read(b"a:1")


def test_a_word_about_a_request_that_the_worker_does_not_know_yet_is_kept(tmp_path: Path) -> None:
    pair = Pair(tmp_path, Reachable())
    known: set[str] = set()
    pair.agent.knows = lambda request: request in known
    pair.nixl.news = {"agent-0": [b"a:1", b"HB:b"]}
    assert pair.agent.get_new_notifs() == {"agent-0": [b"HB:b"]}
    known.add("a")
    assert pair.agent.get_new_notifs() == {"agent-0": [b"a:1"]}


def test_a_word_that_came_early_is_kept_for_as_long_as_it_takes(tmp_path: Path) -> None:
    pair = Pair(tmp_path, Reachable())
    known: set[str] = set()
    pair.agent.knows = lambda request: request in known
    pair.nixl.news = {"agent-0": [b"a:1"]}
    for _ in range(3):  # the source's own core may sleep for any time before it hears that the leg left
        assert pair.agent.get_new_notifs() == {}
    known.add("a")
    assert pair.agent.get_new_notifs() == {"agent-0": [b"a:1"]}


def test_what_was_read_from_a_process_that_ended_meanwhile_does_not_count(tmp_path: Path) -> None:
    source = subprocess.Popen(["sleep", "60"])
    pair = Pair(tmp_path, Reachable(), source.pid)
    assert pair.agent.check_xfer_state(pair.read(b"")) == "DONE"
    handle = pair.read(b"a:1")
    source.kill()
    os.waitid(os.P_PID, source.pid, os.WEXITED | os.WNOWAIT)  # nobody has looked after it: its number is kept
    assert pair.agent.check_xfer_state(handle) == "ERR"
    source.wait()
    assert pair.agent.check_xfer_state(pair.read(b"a:1")) == "ERR"
    assert pair.nixl.told == []


def test_a_process_that_got_the_number_of_another_is_not_taken_for_it() -> None:
    here = Life(os.getpid(), born())
    assert here.lives()
    here.close()
    with pytest.raises(ProcessLookupError, match="not there any more"):
        Life(os.getpid(), born() - 1)
