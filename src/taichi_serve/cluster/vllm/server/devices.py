"""Which devices and cores each instance gets, and who gets those of one that left."""

from __future__ import annotations

import os
import re

from vllm.platforms import current_platform

from taichi_serve.cluster.vllm.server.process import StartError

# Environment of every CPU instance. UCX, under NIXL, else hooks into each mapping of memory, which costs a
# step of the model 3 %; without its hooks it registers memory when told to, which is all that KV needs. And
# glibc else gives the memory of temporaries back to the kernel and has it zeroed again: up to 50,000 page
# faults in 100 steps of a tiny model, by luck, and 2,000 so, which is 5 to 10 % of a step.
ON_CPU = {
    "UCX_MEM_EVENTS": "n",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # bytes; glibc takes no more
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
}
# What may stand in a group: it becomes a value of the environment.
GROUP = re.compile(r"[\w.:/|,-]{1,500}")


class NoDeviceError(ValueError):
    """There is no device for one more instance. The message says why."""


class Devices:
    """The groups of devices, or cores, of the instances of a server; each instance is a number.

    An accelerator is given to one instance, unless somebody names it for two; cores may be shared.
    """

    def __init__(self, count: int, per_instance: int, devices: str | None) -> None:
        """For the first `count` instances. Raises StartError when there are fewer devices than asked for, or
        `devices` has the wrong form."""
        self.per_instance = per_instance
        self._taken = dict(enumerate(_groups(count, per_instance, devices)))
        self._free: list[str] = []  # those of instances that left

    def of(self, index: int) -> str:
        """The group of an instance; "" where vLLM chooses its cores."""
        return self._taken[index]

    def environment(self, index: int) -> dict[str, str]:
        """What its environment has beside the server's own."""
        on_cpu, group = current_platform.is_cpu(), self._taken[index]
        variable = "VLLM_CPU_OMP_THREADS_BIND" if on_cpu else "CUDA_VISIBLE_DEVICES"
        common = {k: v for k, v in ON_CPU.items() if k not in os.environ} if on_cpu else {}
        return common | ({variable: group} if group else {})

    def take(self, index: int, named: str | None = None) -> None:
        """A group for one more instance: the one that is `named`, else one that was given back, else devices
        that nobody has. Raises NoDeviceError where there is none, and ValueError where the name is none."""
        group = self._named(named) if named is not None else self._next()
        if group in self._free:
            self._free.remove(group)
        self._taken[index] = group

    def give_back(self, index: int) -> None:
        """The instance is gone, and its processes are."""
        self._free.append(self._taken.pop(index))

    def _named(self, named: str) -> str:
        group = named.strip()
        if not GROUP.fullmatch(group):
            raise ValueError(f"{named!r} is no group of devices")
        if not current_platform.is_cpu() and len(group.split(",")) != self.per_instance:
            raise ValueError(
                f"{named!r} names {len(group.split(','))} devices, and each instance takes "
                f"{self.per_instance} (--tensor-parallel-size)"
            )
        return group

    def _next(self) -> str:
        if self._free:
            return self._free[0]
        taken = list(self._taken.values())
        if current_platform.is_cpu():
            return min(dict.fromkeys(taken), key=taken.count)
        used = {name for group in taken for name in group.split(",")}
        visible = _visible()
        left = [name for name in visible if name not in used]
        if len(left) < self.per_instance:
            raise NoDeviceError(
                f"no device is free: an instance takes {self.per_instance}, and of {len(visible)} visible "
                f'ones {len(left)} are left; name some that are to be shared in "devices"'
            )
        return ",".join(left[: self.per_instance])


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
    names = _visible()
    if count * per_instance > len(names):
        raise StartError(
            f"{count} instances of {per_instance} GPUs need {count * per_instance}, and there are "
            f"{len(names)}; "
            'let instances share with --devices, as in --devices "0;0"'
        )
    return [",".join(names[i * per_instance : (i + 1) * per_instance]) for i in range(count)]


def _visible() -> list[str]:
    """The accelerators that this process may use."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    available = current_platform.device_count()
    return names[:available] if names != [""] else [str(i) for i in range(available)]


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
