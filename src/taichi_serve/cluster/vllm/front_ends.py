"""How many front ends a server has: processes that speak HTTP and make text of tokens."""

from __future__ import annotations

import argparse

from vllm import envs
from vllm.platforms import current_platform

MOST = 64
# Instances on accelerators for each front end, where nobody says how many: one front end carries 10,000 to
# 15,000 output tokens a second, and an instance on an H200 made 3,100 (chat, a model of 14B).
EACH = 2
WHY_LORA = "one front end would not know what another has loaded"
WHY_STORE = "one front end would not have the responses that another has stored"


def front_ends(args: argparse.Namespace) -> int:
    """How many of a parsed command line; 1 is the server itself. Raises ValueError where so many cannot."""
    one_only = hindrance(args)
    if args.api_server_count is None:
        return 1 if one_only else usual(args)
    count = int(args.api_server_count)
    if not 1 <= count <= MOST:
        raise ValueError(f"--api-server-count must be between 1 and {MOST}, not {count}")
    if count > 1 and one_only:
        raise ValueError(f"--api-server-count above 1 cannot be used with {one_only}")
    return count


def usual(args: argparse.Namespace) -> int:
    """How many there are where nobody says it and nothing stands against it."""
    # On a CPU instances and front ends share the cores, and what one has the others lack.
    if current_platform.is_cpu():
        return 1
    return min(MOST, max(1, (args.p_heavy + args.d_heavy) // EACH))


def hindrance(args: argparse.Namespace) -> str | None:
    """What of the command line or the environment allows one front end only."""
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING: {WHY_LORA}"
    if envs.VLLM_ENABLE_RESPONSES_API_STORE:
        return f"VLLM_ENABLE_RESPONSES_API_STORE: {WHY_STORE}"
    return None if args.otlp_traces_endpoint is None else "--otlp-traces-endpoint"


def remark(args: argparse.Namespace) -> str | None:
    """What the log is to say: that there is one front end only, though instances would have more."""
    one_only, count = hindrance(args), usual(args)
    if args.api_server_count is not None or count == 1 or one_only is None:
        return None
    return f"one front end and not {count}, which cannot be used with {one_only}"
