"""What forked cores rely on (decision 137): what is imported before a fork holds nothing of an instance."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

from vllm.platforms import current_platform  # noqa: E402

# What differs from core to core of one server, or between a server and its cores.
OF_A_CORE = (
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "UCX_MEM_EVENTS",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_NIXL_SIDE_CHANNEL_HOST",
    "VLLM_NIXL_SIDE_CHANNEL_PORT",
    "VLLM_RPC_BASE_PATH",
)
IMPORT = """
import json, os, signal, sys
read = set()
stock = type(os.environ).__getitem__
type(os.environ).__getitem__ = lambda self, name: (read.add(name), stock(self, name))[1]
from taichi_serve.cluster.vllm.core import forks
before = {number: signal.getsignal(number) for number in signal.valid_signals()}
descriptors = set(os.listdir("/proc/self/fd"))
forks.preload()
import multiprocessing.resource_tracker, threading
from vllm import envs
told = {
    "read": sorted(os.fsdecode(name) for name in read),
    "asks": "VLLM_LOGGING_LEVEL" in read,
    "threads": threading.active_count(),
    "tasks": len(os.listdir("/proc/self/task")),
    "signals": [int(n) for n in signal.valid_signals() if signal.getsignal(n) != before[n]],
    "descriptors": len(set(os.listdir("/proc/self/fd")) - descriptors),
    "tracker": multiprocessing.resource_tracker._resource_tracker._fd,
    "cached": hasattr(envs.__getattr__, "cache_info"),
    "late": [name for name in sys.argv[1:] if name not in sys.modules],
}
print(json.dumps(told))
"""
# The large ones that a core and its worker of the CPU have in the end.
LATER = (
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.structured_output",
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl",
    "taichi_serve.cluster.vllm.core.scheduler",
    "taichi_serve.cluster.vllm.core.connector",
)


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What a process says that has imported what a fork server imports."""
    if not current_platform.is_cpu():
        pytest.skip("cores are forked on a CPU only")
    # Not set, so that who copies all that is set reads none of these.
    env = {name: value for name, value in os.environ.items() if name not in OF_A_CORE}
    env["OPENBLAS_NUM_THREADS"] = "1"
    said = subprocess.run(
        [sys.executable, "-c", IMPORT, *LATER], env=env, capture_output=True, check=True, text=True
    )
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return found


def test_no_import_reads_what_differs_from_core_to_core(told: dict[str, Any]) -> None:
    assert told["asks"], "what is read is seen"
    assert not set(told["read"]) & set(OF_A_CORE)
    assert not told["cached"]


def test_imports_start_no_thread_and_open_nothing(told: dict[str, Any]) -> None:
    assert (told["threads"], told["tasks"], told["descriptors"]) == (1, 1, 0)
    assert told["tracker"] is None, "Python's tracker of shared memory would be one for all"
    assert told["signals"] == []


def test_what_a_core_needs_is_there_before_it_is_forked(told: dict[str, Any]) -> None:
    assert told["late"] == []


def test_an_executor_makes_its_workers_by_a_context_that_its_module_names() -> None:
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.executor import multiproc_executor

    executor = inspect.getsource(multiproc_executor)
    assert executor.count("context = get_mp_context()") == 2
    assert "target=WorkerProc.worker_main" in executor
    assert 'context.get_start_method() == "fork"' in executor
    cores = inspect.getsource(OMPProcessManager.configure_omp_envs)
    assert 'envs_dict["GOMP_CPU_AFFINITY"] = cpu_list_str' in cores
    assert '" ".join(cpu_list)' in cores
