"""Energy and memory of GPUs, from a library that is made by hand."""

from __future__ import annotations

import pytest

from taichi_serve.commands.gpus import VISIBLE, Gpus


class Library:
    """Two GPUs: 1,500 and 2,500 J so far, 3 and 5 GiB of memory in use. Every call answers with a status."""

    def __init__(self, failing=""):
        self.failing = failing

    def nvmlInit_v2(self):  # noqa: N802
        return int(self.failing == "init")

    def nvmlDeviceGetCount_v2(self, count):  # noqa: N802
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, number, handle):  # noqa: N802
        handle._obj.value = 100 + number.value
        return 0

    def nvmlDeviceGetName(self, handle, name, size):  # noqa: N802
        name.value = b"NVIDIA H100"
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, milli):  # noqa: N802
        milli._obj.value = {100: 1_500_000, 101: 2_500_000}[handle.value]
        return int(self.failing == "energy")

    def nvmlDeviceGetMemoryInfo(self, handle, memory):  # noqa: N802
        memory._obj.used = {100: 3, 101: 5}[handle.value] << 30
        return int(self.failing == "memory")


@pytest.fixture(autouse=True)
def _all_are_visible(monkeypatch):
    monkeypatch.delenv(VISIBLE, raising=False)


def found(failing=""):
    return Gpus.find(lambda name: Library(failing))


def test_energy_and_memory_are_those_of_all_gpus_together():
    gpus = found()
    assert gpus.names == ("NVIDIA H100", "NVIDIA H100")
    assert gpus.joules() == 4000.0
    assert gpus.used() == 8 << 30


def test_only_the_gpus_that_servers_may_use_are_counted(monkeypatch):
    monkeypatch.setenv(VISIBLE, "1")
    assert (found().joules(), found().used()) == (2500.0, 5 << 30)
    monkeypatch.setenv(VISIBLE, "GPU-8f2c")  # by a name: which numbers these are is not known here
    assert found().joules() == 4000.0


def test_what_a_gpu_does_not_count_is_not_known_and_is_not_nought():
    assert found("energy").joules() is None
    assert found("energy").used() == 8 << 30
    assert found("memory").used() is None


@pytest.mark.parametrize("why", ["no library", "init"])
def test_without_a_driver_there_are_none(why):
    def load(name):
        if why == "no library":
            raise OSError(f"{name}: cannot open shared object file")
        return Library(why)

    gpus = Gpus.find(load)
    assert (gpus.names, gpus.joules(), gpus.used()) == ((), None, None)
