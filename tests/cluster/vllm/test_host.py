"""The machine under the CPUs, as the kernel says it in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from taichi_serve.cluster.vllm.host import cores, free_memory, nodes, numbers


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two NUMA nodes of four cores each, and something else that begins alike."""
    for node, its in (("node0", "0-3\n"), ("node1", "4-7\n")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(its)
    (tmp_path / "node_states").mkdir()
    return tmp_path


def test_a_set_in_the_kernels_form_is_ranges_and_numbers() -> None:
    assert numbers("0-3,8\n") == {0, 1, 2, 3, 8}
    assert numbers("5") == {5}
    assert numbers("\n") == set()


def test_only_nodes_with_usable_cores_count(root: Path) -> None:
    assert nodes({0, 1, 6}, root) == 2
    assert nodes({4, 5}, root) == 1


def test_where_the_kernel_says_nothing_there_is_one_node(tmp_path: Path) -> None:
    assert nodes({0, 1}, tmp_path) == 1


def memory(tmp_path: Path, **group: str) -> int:
    (tmp_path / "meminfo").write_text("MemTotal:  16 kB\nMemAvailable:  8 kB\n")
    for name, value in group.items():
        (tmp_path / f"memory.{name}").write_text(f"{value}\n")
    return free_memory(tmp_path / "meminfo", tmp_path)


def test_what_the_kernel_can_give_is_free(tmp_path: Path) -> None:
    assert memory(tmp_path) == 8192


def test_a_control_group_may_leave_less(tmp_path: Path) -> None:
    assert memory(tmp_path, max="6000", current="1000") == 5000
    assert memory(tmp_path, max="1000", current="6000") == 0
    assert memory(tmp_path, max="60000", current="1000") == 8192
    assert memory(tmp_path, max="max", current="1000") == 8192


def test_this_machine_has_cores_a_node_and_memory() -> None:
    assert cores()
    assert nodes(cores()) >= 1
    assert free_memory() > 0
