"""UCX is told the interface of an address, where nobody chose its devices."""

from __future__ import annotations

from pathlib import Path

from taichi_serve.cluster.vllm.interface import addresses, only


def test_the_loopback_interface_has_its_address() -> None:
    assert addresses()["127.0.0.1"] == "lo"


def test_a_network_of_one_host_is_its_loopback_interface(tmp_path: Path) -> None:
    assert only("127.0.0.2", {}, tmp_path / "none") == {"UCX_NET_DEVICES": "lo"}


def test_who_chose_devices_keeps_them(tmp_path: Path) -> None:
    assert only("127.0.0.1", {"UCX_NET_DEVICES": "mlx5_0:1"}, tmp_path / "none") == {}


def test_where_there_is_rdma_it_stays(tmp_path: Path) -> None:
    (tmp_path / "mlx5_0").mkdir()
    assert only("127.0.0.1", {}, tmp_path) == {}


def test_an_address_of_nobody_says_nothing(tmp_path: Path) -> None:
    assert only("203.0.113.9", {}, tmp_path / "none") == {}
