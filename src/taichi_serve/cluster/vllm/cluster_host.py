"""The address that hosts speak to each other at: what may be said of it on a command line."""

from __future__ import annotations

import argparse
import ipaddress

from vllm import envs


def cluster_host(args: argparse.Namespace) -> str | None:
    """The address, or None where all sockets are files. Raises ValueError where it is none, or where what
    comes over it would be trusted too far."""
    if args.cluster_host is None:
        return None
    try:
        address = ipaddress.IPv4Address(args.cluster_host)
    except ValueError:
        raise ValueError(f"--cluster-host must be an IPv4 address, not {args.cluster_host!r}") from None
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"--cluster-host must be one address of this host, not {address}")
    if envs.VLLM_ALLOW_INSECURE_SERIALIZATION:
        raise ValueError(
            "--cluster-host cannot be used with VLLM_ALLOW_INSECURE_SERIALIZATION: nothing that comes over a "
            "wire is unpickled"
        )
    return str(address)
