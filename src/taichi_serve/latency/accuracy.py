"""Predicted against actual TTFT and TPOT of every instance: sums that metrics export, to see drift."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Drift:
    """Sums that only grow (seconds): the change of a ratio over time is for whoever reads them."""

    count: int = 0
    predicted: float = 0.0
    actual: float = 0.0
    error: float = 0.0  # sum of |actual - predicted|

    def add(self, predicted: float, actual: float) -> None:
        """Take one comparison in."""
        self.count += 1
        self.predicted += predicted
        self.actual += actual
        self.error += abs(actual - predicted)

    @property
    def ratio(self) -> float:
        """Actual over predicted: above 1 the predictor was an optimist; 1.0 before anything was compared."""
        return self.actual / self.predicted if self.predicted > 0 else 1.0

    @property
    def relative_error(self) -> float:
        """Sum of errors over sum of actual times."""
        return self.error / self.actual if self.actual > 0 else 0.0


@dataclass(slots=True)
class Accuracy:
    """How well one instance was predicted."""

    ttft: Drift = field(default_factory=Drift)
    tpot: Drift = field(default_factory=Drift)
