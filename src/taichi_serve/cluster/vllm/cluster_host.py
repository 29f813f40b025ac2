"""Other hosts than the server's: what a command line may say of them."""

from __future__ import annotations

import argparse
import ipaddress

from vllm import envs

from taichi_serve.cluster.vllm.unsaid import bare


def on_hosts(args: argparse.Namespace) -> bool:
    """Whether instances run on the nodes of a cluster of Ray. Raises ValueError where that makes no sense."""
    if not args.ray:
        if args.ray_address is not None:
            raise ValueError("--ray-address needs --ray")
        return False
    if not args.keep_engines >= 0:
        raise ValueError(f"--keep-engines must be at least 0 seconds, not {args.keep_engines:g}")
    if args.devices is not None:
        raise ValueError("--devices cannot be used with --ray: it places instances")
    if bare(args):
        raise ValueError("--ray needs sliders (--p-heavy, --d-heavy): what other hosts have is not looked up")
    return True


def cluster_host(args: argparse.Namespace) -> str | None:
    """The address, or None where all sockets are files. Raises ValueError where it is none, or where what
    comes over it would be trusted too far."""
    if (args.ray or args.cluster_host is not None) and envs.VLLM_ALLOW_INSECURE_SERIALIZATION:
        raise ValueError(
            "--cluster-host and --ray cannot be used with VLLM_ALLOW_INSECURE_SERIALIZATION: nothing that "
            "comes over a wire is unpickled"
        )
    if args.cluster_host is None:
        return None
    try:
        address = ipaddress.IPv4Address(args.cluster_host)
    except ValueError:
        raise ValueError(f"--cluster-host must be an IPv4 address, not {args.cluster_host!r}") from None
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"--cluster-host must be one address of this host, not {address}")
    return str(address)
