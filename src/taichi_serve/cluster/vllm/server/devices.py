"""Which devices and cores each instance gets, and who gets those of one that left."""

from __future__ import annotations

import os
import re

from vllm.platforms import current_platform

from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.surroundings import on_cpu

# What may stand in a group: it becomes a value of the environment.
GROUP = re.compile(r"[\w.:/|,-]{1,500}", re.ASCII)
RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)  # a core, or several


class NoDeviceError(ValueError):
    """There is no device for one more instance. The message says why."""


class Devices:
    """The groups of devices, or cores, of the instances of a server; each instance is a number.

    An accelerator is given to one instance, unless somebody names it for two; cores may be shared. Groups
    that somebody named for an instance leave with it: whose they are, only who named them knows.
    """

    def __init__(self, count: int, per_instance: int, devices: str | None) -> None:
        """For the first `count` instances. Raises StartError when there are fewer devices than asked for, or
        `devices` has the wrong form."""
        self.per_instance = per_instance
        self._taken = dict(enumerate(_groups(count, per_instance, devices)))
        self._ours = dict.fromkeys(self._taken.values())  # groups that nobody named for one instance
        self._failed: dict[str, None] = {}  # devices on which the last start failed, the latest last

    def of(self, index: int) -> str:
        """The group of an instance; "" where vLLM chooses its cores."""
        return self._taken[index]

    def environment(self, index: int) -> dict[str, str]:
        """What its environment has beside the server's own."""
        cores, group = current_platform.is_cpu(), self._taken[index]
        variable = "VLLM_CPU_OMP_THREADS_BIND" if cores else "CUDA_VISIBLE_DEVICES"
        return (on_cpu() if cores else {}) | ({variable: group} if group else {})

    def spare(self) -> set[int]:
        """Cores that this process may use and on which no instance computes. None of them where vLLM chooses
        the cores of an instance, and without a CPU."""
        groups = self._taken.values()
        ranges = [RANGE.fullmatch(part) for group in groups for part in _each(group)]
        if not current_platform.is_cpu() or not all(groups):
            return set()
        used = [range(int(one[1]), int(one[2] or one[1]) + 1) for one in ranges if one is not None]
        return os.sched_getaffinity(0).difference(*used) if len(used) == len(ranges) else set()

    def take(self, index: int, named: str | None = None) -> None:
        """A group for one more instance: the one that is `named`, else one of ours that nobody has, else
        devices that nobody has. What failed lately is taken last. Raises NoDeviceError where there is none,
        and ValueError where the name is none."""
        if named is not None:
            self._taken[index] = self._named(named)
            return
        group = self._next()
        self._taken[index] = group
        self._ours[group] = None

    def give_back(self, index: int, failed: bool = False) -> None:
        """The instance is gone, and its processes are; or its start `failed`."""
        for device in _each(self._taken.pop(index)):
            self._failed.pop(device, None)
            if failed:
                self._failed[device] = None

    def _named(self, named: str) -> str:
        group = named.strip()
        if not GROUP.fullmatch(group):
            raise ValueError(f"{named[:80]!r} is no group of devices")
        if not current_platform.is_cpu() and len(group.split(",")) != self.per_instance:
            raise ValueError(
                f"{named!r} names {len(group.split(','))} devices, and each instance takes "
                f"{self.per_instance} (--tensor-parallel-size)"
            )
        return group

    def _next(self) -> str:
        by_luck = sorted(self._ours, key=self._bad_luck)
        if current_platform.is_cpu():
            return min(by_luck, key=lambda group: (self._users(group), self._bad_luck(group)))
        free = [group for group in by_luck if not self._users(group)]
        if free and not self._bad_luck(free[0]):
            return free[0]
        visible = _visible()
        left = sorted((name for name in visible if not self._users(name)), key=self._bad_luck)
        fresh = ",".join(left[: self.per_instance])
        if len(left) >= self.per_instance and not (free and self._bad_luck(fresh)):
            return fresh
        if free:
            return free[0]
        raise NoDeviceError(
            f"no device is free: an instance takes {self.per_instance}, and of {len(visible)} visible "
            f'ones {len(left)} are left; name some that are to be shared in "devices"'
        )

    def _users(self, group: str) -> int:
        """How many present instances use a device of this group."""
        return sum(_meet(group, taken) for taken in self._taken.values())

    def _bad_luck(self, group: str) -> int:
        """0 where no start failed on it, and the more the later one did."""
        order = list(self._failed)
        return max((order.index(one) + 1 for one in _each(group) if one in self._failed), default=0)


def _each(group: str) -> list[str]:
    """The devices of a group; of cores also their ranges."""
    return [part.strip() for part in re.split(r"[,|]", group) if part.strip()]


def _meet(one: str, other: str) -> bool:
    """Whether two groups have a device, or a core, in common."""
    return any(_same(x, y) for x in _each(one) for y in _each(other))


def _same(one: str, other: str) -> bool:
    a, b = RANGE.fullmatch(one), RANGE.fullmatch(other)
    if a is None or b is None:
        return one == other
    return int(a[1]) <= int(b[2] or b[1]) and int(b[1]) <= int(a[2] or a[1])


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
