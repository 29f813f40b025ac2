"""What instances on other hosts are begun with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.hosts.held import Holding
from taichi_serve.cluster.vllm.hosts.launching import Elsewhere, carried, on_ray
from taichi_serve.cluster.vllm.server.devices import Devices
from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.sliders import Kind


class Places:
    """One process has a place."""

    def place(self, name: str, kind: Kind, wanted: Callable[[], bool]) -> Holding | None:
        return None

    def address(self, name: str) -> str:
        return "10.0.0.2" if name == "i1.2" else ""


def test_settings_of_engines_go_along_and_what_is_of_one_host_does_not() -> None:
    here = {
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "HF_HUB_OFFLINE": "1",
        "NCCL_DEBUG": "INFO",
        "PATH": "/usr/bin",
        "TMPDIR": "/tmp/mine",
        "VLLM_API_KEY": "a key",
        "VLLM_RPC_BASE_PATH": "/tmp/taichi-x",
        "VLLM_CPU_OMP_THREADS_BIND": "0,1",
        "UCX_NET_DEVICES": "eth7",
    }
    found = carried(here)
    assert {name for name in here if name in found} == {"VLLM_LOGGING_LEVEL", "HF_HUB_OFFLINE", "NCCL_DEBUG"}


def test_an_instance_is_where_its_last_process_was_placed() -> None:
    devices = Elsewhere(1, Places())
    assert devices.of(1) == ""
    devices.begun(1, "i1")
    assert devices.of(1) == ""
    devices.begun(1, "i1.2")
    assert devices.of(1) == "10.0.0.2"
    devices.give_back(1)
    assert devices.of(1) == ""


def test_whatever_is_asked_of_devices_is_answered_for_other_hosts_too() -> None:
    """They have no groups: what a server on one host asks of those must not be asked of them."""
    asked = {name for name in vars(Devices) if not name.startswith("_")}
    assert asked <= set(vars(Elsewhere))
    assert Elsewhere(1, Places()).spare() == set()


def test_nobody_names_devices_of_other_hosts() -> None:
    devices = Elsewhere(1, Places())
    devices.take(0)
    with pytest.raises(ValueError, match="devices cannot be named with --ray"):
        devices.take(0, "0,1")


def test_without_ray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "taichi_serve.cluster.vllm.hosts.rays", "taichi_serve.cluster.vllm.hosts.actor"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    args = SimpleNamespace(ray_address=None, cluster_host=None)
    with pytest.raises(StartError, match="install the extra `ray`"):
        on_ray(args, 1, lambda words: None)  # type: ignore[arg-type]
