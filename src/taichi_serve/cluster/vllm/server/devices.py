"""Which devices and cores each instance gets."""

from __future__ import annotations

import os

from vllm.platforms import current_platform

from taichi_serve.cluster.vllm.server.process import StartError

# Environment of every CPU instance. UCX, under NIXL, else hooks into each mapping of memory, which costs a
# step of the model 3 %; without its hooks it registers memory when told to, which is all that KV needs.
ON_CPU = {"UCX_MEM_EVENTS": "n"}


def environments(count: int, per_instance: int, devices: str | None) -> list[dict[str, str]]:
    """What the instances' environments have beside the server's own: devices and cores.

    Raises StartError when there are fewer devices than asked for, or `devices` has the wrong form.
    """
    groups = _groups(count, per_instance, devices)
    on_cpu = current_platform.is_cpu()
    variable = "VLLM_CPU_OMP_THREADS_BIND" if on_cpu else "CUDA_VISIBLE_DEVICES"
    common = {k: v for k, v in ON_CPU.items() if k not in os.environ} if on_cpu else {}
    return [common | ({variable: group} if group else {}) for group in groups]


def _groups(count: int, per_instance: int, devices: str | None) -> list[str]:
    if devices is not None:
        groups = [group.strip() for group in devices.split(";")]
        if len(groups) != count or not all(groups):
            raise StartError(f"--devices {devices!r} names {len(groups)} groups for {count} instances")
        return groups
    if current_platform.is_cpu():
        if "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
            return [""] * count
        return _cores(count, per_instance)
    available = current_platform.device_count()
    if count * per_instance > available:
        raise StartError(
            f"{count} instances of {per_instance} GPUs need {count * per_instance}, and there are "
            f"{available}; "
            'let instances share with --devices, as in --devices "0;0"'
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if visible != [""] else [str(i) for i in range(available)]
    return [",".join(names[i * per_instance : (i + 1) * per_instance]) for i in range(count)]


def _cores(count: int, ranks: int) -> list[str]:
    """The cores this process may use, divided evenly over instances and their tensor-parallel ranks.

    With fewer cores than ranks they are shared. The form is vLLM's: ranks split by "|".
    """
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // (count * ranks))
    chunks = [
        ",".join(str(cores[(rank * share + k) % len(cores)]) for k in range(share))
        for rank in range(count * ranks)
    ]
    return ["|".join(chunks[i * ranks : (i + 1) * ranks]) for i in range(count)]
