"""KV transfer between instances: latency, bandwidth, and ports that are shared first come, first served.

Every instance has one port out and one port in. Two transfers that want the same port follow each other: as
many bytes pass in a second as if they had shared it, and the earlier one is done earlier.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Link:
    """`latency` in seconds for each transfer, `bandwidth` in bytes/s of a port, `bytes_per_token` of KV."""

    bytes_per_token: float
    bandwidth: float
    latency: float
    _out: dict[str, float] = field(default_factory=dict)  # when the port out of an instance is free again
    _in: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.latency >= 0 and self.bytes_per_token >= 0):
            raise ValueError("a link needs bandwidth above 0, latency and bytes_per_token of at least 0")

    def landing(self, now: float, source: str, target: str, tokens: int) -> float:
        """When the KV of `tokens` that is asked for at `now` has arrived; takes the ports until then."""
        start = max(now, self._out.get(source, 0.0), self._in.get(target, 0.0))
        end = start + tokens * self.bytes_per_token / self.bandwidth
        self._out[source] = self._in[target] = end
        return end + self.latency
