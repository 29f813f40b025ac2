"""A command line without a slider: what the machine and the model are is looked up, and the start is chosen
(tuning/start.py) and said.

The choice becomes flags at the end of the command line: engines, and whoever reads the log, see it as if
somebody had given it.
"""

from __future__ import annotations

import argparse
import os
from functools import partial

from vllm.config import ModelConfig
from vllm.platforms import current_platform

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.host import cores, free_memory, nodes
from taichi_serve.cluster.vllm.identity import MPS_SHARE, device_name, kv_bytes
from taichi_serve.cluster.vllm.model import model_config, plain, shape, weight_bytes
from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.cluster.vllm.server.scratch import Say
from taichi_serve.cluster.vllm.server.warm import paced
from taichi_serve.cluster.vllm.unsaid import bare
from taichi_serve.latency.known import WHOLE, Known, Question, known
from taichi_serve.slo import SLO
from taichi_serve.tuning.start import PROMPT, Devices, Given, Host, Model, Start, choose, raised

FITTED = 8192  # tokens of the longest request where vLLM finds out itself how long one may be


def begun(
    args: argparse.Namespace, argv: list[str], say: Say
) -> tuple[argparse.Namespace, list[str], Start | None]:
    """The command line as it is to be served with, and how it was completed; as it was where it names a
    slider. Raises ValueError with one line where vLLM cannot make anything of the model."""
    if not bare(args):
        return args, argv, None
    start = chosen(args, argv)
    for line in start.said:
        say(line)
    # SLOs that the server has chosen are none that somebody has named: they demote nobody.
    late = () if "overload" in args.said else ("--overload", args.overload)
    argv = [*argv, *start.words(_said(args)), *late]
    return flags.parse(argv), argv, start


def chosen(args: argparse.Namespace, argv: list[str]) -> Start:
    """How a server with this command line starts here."""
    model = model_config(args, argv)
    groups = args.devices.split(";") if args.devices else []
    machine = _host(args) if current_platform.is_cpu() else _devices(args, groups)
    its = _model(model, args)
    return choose(_given(args, groups), its, machine, partial(_known, args, model, its, machine))


def _known(
    args: argparse.Namespace, model: ModelConfig, its: Model, machine: Devices | Host, degree: int
) -> Known | None:
    """What is known of steps of this model here, with so many devices an instance."""
    if (profile := flags.profile(args)) is not None:
        return Known.of(profile, args.profile)
    if isinstance(machine, Host):
        return None
    memory = machine.memory / args.gpu_memory_utilization
    dense = shape(model) if plain(model) else None
    share = os.environ.get(MPS_SHARE, WHOLE)
    return known(Question(args.model, its.kv_bytes, dense, machine.name, memory, share), degree)


async def promised(args: argparse.Namespace, start: Start | None, cluster: VllmCluster, say: Say) -> SLO:
    """The SLOs to serve with. Those that nobody gave and nobody could know are raised where the first steps
    say that they cannot be kept."""
    slo = flags.slo(args)
    if start is None or not start.unsure:
        return slo
    pace = await paced(cluster, PROMPT)
    if pace is None or raised(start, *pace) == slo:
        return slo
    # Once more: what else this machine did for a moment must not become a promise.
    again = await paced(cluster, PROMPT) or pace
    seen = raised(start, min(pace[0], again[0]), min(pace[1], again[1]))
    if seen == slo:
        return slo
    say(f"TTFT SLO {seen.ttft:g} s, TPOT SLO {seen.tpot * 1e3:g} ms (by what the first steps took)")
    return seen


# ------------------------------------------------------------------------------------------ what there is


def _said(args: argparse.Namespace) -> frozenset[str]:
    """The names of what is chosen and was said already: vLLM warns of flags that are there twice."""
    ours: frozenset[str] = args.said
    degree = {"tensor_parallel_size"} if args.tensor_parallel_size > 1 else set()
    return ours | degree | ({"max_num_batched_tokens"} if args.max_num_batched_tokens else set())


def _given(args: argparse.Namespace, groups: list[str]) -> Given:
    each = len(groups[0].split(",")) if groups and not current_platform.is_cpu() else None
    degree = args.tensor_parallel_size if args.tensor_parallel_size > 1 else each

    def said(name: str) -> float | None:
        return getattr(args, name) if name in args.said else None

    return Given(
        args.instances or len(groups) or None,
        degree,
        args.max_num_batched_tokens,
        args.max_num_seqs,
        said("ttft_slo"),
        said("tpot_slo"),
        args.autotune if "autotune" in args.said else None,
    )


def _model(model: ModelConfig, args: argparse.Namespace) -> Model:
    limit = int(model.max_model_len)
    return Model(
        weight_bytes(model),
        kv_bytes(model, args.kv_cache_dtype),
        min(limit, FITTED) if args.max_model_len == -1 else limit,
        int(model.model_arch_config.total_num_attention_heads),
        int(model.get_total_num_kv_heads()),
    )


def _devices(args: argparse.Namespace, groups: list[str]) -> Devices:
    """The visible accelerators, or those that were given."""
    visible = current_platform.device_count()
    names = {name for group in groups for name in group.split(",")}
    smallest = min((current_platform.get_device_total_memory(i) for i in range(visible)), default=0)
    name, usable = device_name() if visible else "GPU", smallest * args.gpu_memory_utilization
    return Devices(name, len(names) or visible, usable, smallest, args.kv_cache_memory_bytes)


def _host(args: argparse.Namespace) -> Host:
    usable = cores()
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    kv = args.kv_cache_memory_bytes or (float(space) * (1 << 30) if space else flags.CPU_KV_BYTES)
    return Host(device_name(), len(usable), nodes(usable), free_memory(), kv)
