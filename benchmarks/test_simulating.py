"""How fast the simulation is: requests simulated in a second, policies included, and how that grows.

    PYTHONPATH=src pytest benchmarks/test_simulating.py
    scripts/compile.sh && PYTHONPATH=build/compiled pytest benchmarks/test_simulating.py

`requests_per_cpu_second` counts processor time, so other work on the machine does not change it.
"""

import gc
import time
import tracemalloc
from pathlib import Path

import pytest

from taichi_serve.bench.workload import Workload, workload
from taichi_serve.cluster.base import run
from taichi_serve.latency.shipped import machine
from taichi_serve.scheduling.policy import Policy
from taichi_serve.search.goodput import Scene
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

TRACE = Path(__file__).parent.parent.parent / "shared/data/traces/arxiv_summarization.csv"
SLO_6_100 = SLO(6.0, 0.1)
CONTENDERS = {
    "aggregation": (Sliders(0, 8, 0, 512), Policy(ttft_margin=1.0)),
    "disaggregation": (Sliders(6, 2, 4096, 0), Policy(watermark=1.0)),
    "hybrid": (Sliders(6, 2, 2048, 128), Policy()),
}


def arxiv() -> Workload:
    """The arXiv trace where it is there; else lengths like it."""
    found = machine("llama-2-70b-tp4-a100")
    if TRACE.exists():
        return workload(str(TRACE), found.max_model_len)
    return workload("summarization", found.max_model_len)


def simulated(sliders: Sliders, policy: Policy, rate: float, requests: int) -> float:
    """Processor seconds of one run."""
    scene = Scene(machine("llama-2-70b-tp4-a100"), arxiv(), SLO_6_100)
    cluster = scene.cluster(sliders, rate, requests, 1)
    scheduler = scene.scheduler(sliders, policy, cluster.capacities)
    gc.collect()
    began = time.process_time()
    run(scheduler, cluster)
    return time.process_time() - began


@pytest.mark.parametrize("name", list(CONTENDERS))
def test_requests_simulated_in_a_second_with_8_instances(benchmark, name):
    sliders, policy = CONTENDERS[name]
    seconds = benchmark.pedantic(simulated, (sliders, policy, 11.0, 3000), rounds=2, iterations=1)
    benchmark.extra_info["requests_per_cpu_second"] = round(3000 / seconds)


@pytest.mark.parametrize("instances", [8, 32, 125, 500, 1000])
def test_cost_of_a_request_by_number_of_instances(benchmark, instances):
    sliders = Sliders(instances * 3 // 4, instances - instances * 3 // 4, 2048, 128)
    seconds = benchmark.pedantic(
        simulated, (sliders, Policy(), 1.3 * instances, 2000), rounds=1, iterations=1
    )
    benchmark.extra_info["microseconds_per_request"] = round(seconds / 2000 * 1e6)


@pytest.mark.parametrize("requests", [1000, 4000, 16000])
def test_memory_does_not_grow_with_the_trace(benchmark, requests):
    def peak() -> int:
        scene = Scene(machine("llama-2-70b-tp4-a100"), workload("summarization", 4096), SLO_6_100)
        sliders, policy = CONTENDERS["hybrid"]
        cluster = scene.cluster(sliders, 9.0, requests, 1)
        scheduler = scene.scheduler(sliders, policy, cluster.capacities)
        tracemalloc.start()
        run(scheduler, cluster)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    most = benchmark.pedantic(peak, rounds=1, iterations=1)
    benchmark.extra_info["peak_kilobytes"] = most // 1024
    assert most < 8_000_000
