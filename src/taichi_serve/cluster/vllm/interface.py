"""The network interface of this host that has an address: UCX, under NIXL, listens on all of them unless told
otherwise."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

SIOCGIFCONF = 0x8912  # netdevice(7): every IPv4 address with the name of its interface
ENTRY = 40  # bytes of a struct ifreq: a name, and 4 bytes later an address
MOST = 256  # addresses that are looked at
RDMA = Path("/sys/class/infiniband")
DEVICES = "UCX_NET_DEVICES"


def addresses() -> dict[str, str]:
    """IPv4 addresses of this host, each with its interface."""
    space = array.array("B", bytes(MOST * ENTRY))
    ask = struct.pack("iL", len(space), space.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        size = struct.unpack("iL", fcntl.ioctl(any_socket, SIOCGIFCONF, ask))[0]
    entries = (space[at : at + ENTRY].tobytes() for at in range(0, size, ENTRY))
    names = ((entry[20:24], entry[:16].split(b"\0")[0].decode()) for entry in entries)
    return {socket.inet_ntoa(address): name.split(":")[0] for address, name in names}


def only(host: str, environment: Mapping[str, str] = os.environ, rdma: Path = RDMA) -> dict[str, str]:
    """What has UCX listen on the interface of this address alone. Nothing where the user chose its devices,
    or where there are others than these: naming one would take them away."""
    name = "lo" if host.startswith("127.") else addresses().get(host)
    chosen = DEVICES in environment or (rdma.is_dir() and any(rdma.iterdir()))
    return {} if chosen or name is None else {DEVICES: name}
