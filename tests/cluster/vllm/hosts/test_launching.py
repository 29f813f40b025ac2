"""What instances on other hosts are begun with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.curve import new_pair
from taichi_serve.cluster.vllm.hosts.found import Found, asked_until, chosen
from taichi_serve.cluster.vllm.hosts.held import Holding
from taichi_serve.cluster.vllm.hosts.launching import Elsewhere, Hosts, carried, likeness, on_ray
from taichi_serve.cluster.vllm.hosts.words import Begun, Offer
from taichi_serve.cluster.vllm.server.devices import Devices
from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.sliders import Kind


class Places:
    """One process has a place."""

    def __init__(self, *found: Found) -> None:
        self.found = list(found)
        self.settled: list[tuple[str, Kind, Holding]] = []

    def place(self, name: str, kind: Kind, wanted: Callable[[], bool]) -> Holding | None:
        return None

    def offers(self) -> list[Found]:
        return self.found

    def settle(self, name: str, kind: Kind, holding: Holding) -> None:
        self.settled.append((name, kind, holding))

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
        on_ray(args, [], 1, "taichi-abc", lambda words: None)  # type: ignore[arg-type]


MESH = new_pair()


class Kept:
    """A holder whose engine was found."""

    def __init__(self) -> None:
        self.ended = self.left = False

    def end(self) -> bool:
        self.ended = True
        return True

    def leave(self) -> None:
        self.left = True


def found(name: str, run: str = "taichi-abc") -> Found:
    holding: Any = Kept()
    return Found(Offer(run, name, f"{run}-{name}", MESH, Begun(4711, "10.0.0.2", 0)), holding)


def test_of_each_instance_one_is_taken_and_all_are_of_one_run() -> None:
    one, two, other, beyond = found("i0.3"), found("i1"), found("i2", "taichi-xyz"), found("i3")
    assert chosen([other, beyond, two, one], 3) == {0: one, 1: two}
    assert chosen([], 3) == {}
    assert chosen([found("i7")], 3) == {}


def test_engines_whose_server_was_heard_just_now_are_asked_again_for_a_while() -> None:
    one, now = found("i0"), [100.0]
    asked: list[list[str]] = []

    def ask(holders: list[str]) -> tuple[list[Found], list[str]]:
        asked.append(holders)
        gone = now[0] >= 102.0
        return ([one] if gone and "gone" in holders else []), [h for h in holders if h != "gone" or not gone]

    def wait(seconds: float) -> None:
        now[0] += seconds

    assert asked_until(ask, ["gone", "lives"], 4.0, lambda: now[0], wait) == [one]
    assert (asked[0], asked[-1], now) == (["gone", "lives"], ["lives"], [104.0])
    assert asked_until(ask, [], 4.0) == []


def test_who_is_found_keeps_its_place_and_its_key_and_who_is_not_wanted_is_ended() -> None:
    one, beyond = found("i1.2"), found("i2")
    places, said = Places(one, beyond), list[str]()
    hosts = Hosts(places, 1, said.append, "taichi-new")
    hosts.find([Kind.P_HEAVY, Kind.D_HEAVY])
    assert places.settled == [("i1", Kind.D_HEAVY, one.holding)]
    assert hosts.mesh == MESH
    assert [one.holding.ended, beyond.holding.ended, beyond.holding.left] == [False, True, True]  # type: ignore[attr-defined]
    assert said == ["found 1 of 2 instances, of a server that is gone"]


def test_only_servers_with_the_same_words_and_settings_are_alike() -> None:
    assert likeness(["m", "--ray"], {"A": "1", "B": "2"}) == likeness(["m", "--ray"], {"B": "2", "A": "1"})
    assert likeness(["m", "--ray"], {}) != likeness(["m", "--ray", "--seed", "1"], {})
    assert likeness(["m", "--ray"], {}) != likeness(["m", "--ray"], {"VLLM_LOGGING_LEVEL": "DEBUG"})
