"""Who gets which devices or cores, and who gets those of an instance that left."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from house import on_gpus

from taichi_serve.cluster.vllm.server import devices
from taichi_serve.cluster.vllm.server.devices import Devices, NoDeviceError


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.current_platform, "is_cpu", lambda: True)


def test_a_new_instance_gets_devices_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, 8)
    here = Devices(2, 2, None)
    assert [here.of(0), here.of(1)] == ["0,1", "2,3"]
    here.take(2)
    here.take(3, "4,5")  # shared, because somebody says so
    assert (here.of(2), here.of(3)) == ("4,5", "4,5")
    with pytest.raises(ValueError, match="'7' names 1 devices, and each instance takes 2"):
        here.take(4, "7")
    with pytest.raises(ValueError, match="is no group of devices"):
        here.take(4, "0;rm -rf")
    here.take(4)
    assert here.environment(4) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    here.give_back(0)
    here.take(5)
    assert here.of(5) == "0,1"


def test_cores_are_shared_by_as_few_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.current_platform, "is_cpu", lambda: True)
    here = Devices(3, 1, "0;1;1")
    here.take(3)
    assert here.of(3) == "0"
    here.give_back(1)
    here.take(4)
    assert here.of(4) == "1"


def test_devices_that_somebody_named_are_given_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, 2)
    here = Devices(2, 1, None)
    here.take(2, "GPU-of-somebody")
    here.give_back(2)
    with pytest.raises(NoDeviceError):
        here.take(3)


def test_devices_that_are_shared_are_not_free_before_the_last_one_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpus(monkeypatch, 2)
    here = Devices(2, 1, "0;0")
    here.take(2)
    here.give_back(0)
    with pytest.raises(NoDeviceError):
        here.take(3)
    here.give_back(1)
    here.take(3)
    assert here.of(3) == "0"


def test_a_pair_of_which_one_device_is_in_use_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, 4)
    here = Devices(2, 2, None)  # "0,1" and "2,3"
    here.take(2, "1,2")
    here.give_back(0)
    with pytest.raises(NoDeviceError, match="of 4 visible ones 1 are left"):
        here.take(3)
    here.give_back(2)
    here.take(3)
    assert here.of(3) == "0,1"


def test_a_device_on_which_a_start_failed_is_taken_last(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, 4)
    here = Devices(1, 1, None)
    here.take(1)
    assert here.of(1) == "1"
    here.give_back(1, failed=True)
    here.take(2)
    assert here.of(2) == "2"
    here.give_back(2, failed=True)
    here.take(3)
    assert here.of(3) == "3"
    here.take(4)
    assert here.of(4) == "1"  # which failed first
    here.give_back(4)  # it ran well
    here.take(5)
    assert here.of(5) == "1"


def test_of_two_groups_that_were_given_back_the_one_that_failed_is_the_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpus(monkeypatch, 0)
    here = Devices(2, 1, "GPU-a;GPU-b")
    here.give_back(0, failed=True)
    here.give_back(1)
    here.take(2)
    here.take(3)
    assert (here.of(2), here.of(3)) == ("GPU-b", "GPU-a")


@pytest.mark.usefixtures("on_cpu")
def test_cores_that_somebody_named_are_shared_with_nobody_and_ranges_of_cores_meet() -> None:
    here = Devices(2, 1, "0-3;4-7")
    here.take(2, "8-11")
    here.take(3, "2")
    here.take(4)
    assert here.of(4) == "4-7"


def test_cores_on_which_nobody_computes_are_for_the_engine_cores(
    monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(8)))
    here = Devices(2, 1, "0-2;4")
    assert here.spare() == {3, 5, 6, 7}
    here.take(2, "5|7")
    assert here.spare() == {3, 6}
    here.give_back(0)
    assert here.spare() == {0, 1, 2, 3, 6}


@pytest.mark.parametrize("groups", ["nobind", "0;auto", "0-7"])
def test_none_are_spare_where_vllm_chooses_or_all_are_used(
    groups: str, monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(8)))
    assert Devices(groups.count(";") + 1, 1, groups).spare() == set()


def test_no_core_is_spare_where_vllms_own_variable_says_them(
    monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    assert Devices(1, 1, None).spare() == set()


def test_on_accelerators_no_core_is_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, 2)
    assert Devices(2, 1, "0;1").spare() == set()
