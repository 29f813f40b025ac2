"""Hosts that are pretended on one machine: network namespaces on one bridge. Needs root and `ip`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count

import pytest

NETWORK = "10.213.7"
DAY = 86_400  # seconds
HERE = f"{NETWORK}.254"  # of the machine itself, on the bridge


@cache
def impossible() -> str | None:
    """Why this machine does not let us, or None. It is tried: root in a container may not be enough."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "ss", "unshare"))):
        return "hosts are network namespaces: that needs root, iproute2 and util-linux"
    probe = Host(f"tf{os.getpid()}try", HERE, "", up=DAY)
    try:
        ip("netns", "add", probe.name)
        try:
            subprocess.run(probe.within("true"), check=True, capture_output=True)
            ip("-n", probe.name, "link", "add", "name", "bridge0", "type", "bridge")
        finally:
            ip("netns", "del", probe.name)
    except subprocess.CalledProcessError as wrong:
        return f"no namespaces here: {wrong.stderr.decode(errors='replace').strip()}"
    return None


def ip(*words: str) -> None:
    """The command, which raises where it fails."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass(frozen=True)
class Host:
    """One of them."""

    name: str
    address: str
    cable: str  # the bridge's end of it
    up: int = 0  # seconds that it has been up longer than the machine: its clock says so

    def within(self, *words: str) -> list[str]:
        """A command line that runs there."""
        clock = ["unshare", "--time", "--monotonic", str(self.up), "--fork"] if self.up else []
        return ["ip", "netns", "exec", self.name, *clock, *words]

    def run(self, *words: str, timeout: float = 60.0) -> str:
        """What a command says that runs there."""
        done = subprocess.run(
            self.within(*words), capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def cut(self, on: bool = True) -> None:
        """Take its cable out, or plug it in again."""
        ip("link", "set", self.cable, "down" if on else "up")


_networks = count()


@contextlib.contextmanager
def network(*names: str) -> Iterator[list[Host]]:
    """Hosts of these names, each with an interface eth0 on one network, and this machine at `HERE`. The first
    has the machine's clock, and each of the others one that is a day ahead of the one before. Skips the
    test where that cannot be."""
    if (why := impossible()) is not None:
        pytest.skip(why)
    # Another one for each: what is in a namespace may stay a while. A name of an interface is short.
    number = f"{os.getpid()}{'abcdefgh'[next(_networks)]}"
    hosts = [
        Host(f"tf{number}{name}", f"{NETWORK}.{n}", f"v{number}n{n}", (n - 1) * DAY)
        for n, name in enumerate(names, 1)
    ]
    with contextlib.ExitStack() as stack:
        bridge = f"tf{number}"
        ip("link", "add", bridge, "type", "bridge")
        stack.callback(ip, "link", "del", bridge)
        ip("addr", "add", f"{HERE}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for host in hosts:
            ip("netns", "add", host.name)
            stack.callback(ip, "netns", "del", host.name)
            ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("link", "set", host.cable, "master", bridge, "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts
