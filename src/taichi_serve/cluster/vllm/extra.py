"""Our own entry in the sampling parameters of an engine request, and the words around it.

Server and engines agree on these; users never see them, and may not set them (frontend/client.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vllm.v1.request import Request

# The stop reason of a leg that ended because the request goes on elsewhere. Users never see it.
LEFT = "taichi:left"
# The stop reason of a leg whose KV could not be read within its first step.
UNREAD = "taichi:unread"
# Key of our entry in SamplingParams.extra_args, and in SchedulerStats.kv_connector_stats.
KEY = "taichi"


class MovedIn(NamedTuple):
    """What became of a request that moved in, known when it is scheduled. Times are time.monotonic()."""

    reused: int = 0  # tokens it need not compute: pulled, or still cached here
    pulled: int = 0  # of these, from the instance before
    arrived: float = 0.0  # it came here
    began: float = 0.0  # its blocks were given and the pull was asked for
    landed: float = 0.0  # the last byte was known to be here
    before: float = 0.0  # the last step without it was scheduled
    scheduled: float = 0.0  # it went into a step


def extra(request: Request) -> dict[str, Any]:
    """Our own entry: `hand_over`, and `reader`, the leg that its KV is pinned for; or `moved` and `output`;
    or these and `ahead`, tokens of room to keep."""
    params = request.sampling_params
    return (params.extra_args or {}).get(KEY) or {} if params is not None else {}
