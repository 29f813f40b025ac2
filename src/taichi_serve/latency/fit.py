"""Measured steps -> the coefficients of the step model, and how wrong it is on steps it has not seen.

Least squares of the RELATIVE error (a step of 5 ms counts as much as one of 500 ms), with coefficients kept
non-negative: a negative one would promise that more work takes less time somewhere. Relative to what the
model says, not to what was measured: dividing by the measured seconds would trust a step the more the shorter
it came out, and on a noisy machine the model would be too fast by a fifth. So the weights come from the fit
before, and what is fitted is the mean, which is what queues and TPOT are made of. With six features there
are 63 sets of active ones; solving each and keeping the best feasible one is exact and needs no solver. The
knee enters nonlinearly, so it is tried on a grid. This is not for hundreds of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from taichi_serve.latency.model import Batch, Roofline

Matrix = npt.NDArray[np.float64]

# Tokens at which a step turns from reading weights to computing: from "at once" to beyond any GPU's balance.
KNEES = (0, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024)
FEATURES = 6
FOLDS = 5
ROUNDS = 3  # of weighting by what the model says instead of by what was measured


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured step: what was in it and how long it took (seconds)."""

    batch: Batch
    seconds: float


@dataclass(frozen=True, slots=True)
class FitError:
    """Relative error on held-out steps: 0.05 is 5 %."""

    median: float
    p95: float


def fit(samples: Sequence[Sample]) -> Roofline:
    """The step model that fits best; raises ValueError with fewer steps than it has coefficients."""
    if len(samples) <= FEATURES:
        raise ValueError(
            f"{len(samples)} steps are too few: the model has {FEATURES} coefficients and a knee"
        )
    seconds = np.array([s.seconds for s in samples])
    tables = [_features(samples, knee) for knee in KNEES]
    model = _weighted(tables, seconds, 1.0 / seconds)
    for _ in range(ROUNDS):
        model = _weighted(tables, seconds, 1.0 / np.array([model.seconds(s.batch) for s in samples]))
    return model


def _weighted(tables: Sequence[Matrix], seconds: Matrix, weights: Matrix) -> Roofline:
    """The step model with the least squares of weighted errors; `tables` are the features for each knee."""
    fitted = [_solve(rows * weights[:, None], seconds * weights) for rows in tables]
    best = min(range(len(KNEES)), key=lambda n: fitted[n][0])
    launch, mixed, token, attention, decode, kv = (float(c) for c in fitted[best][1])
    return Roofline(launch, mixed, token, attention, decode, kv, float(KNEES[best]))


def held_out_error(samples: Sequence[Sample]) -> FitError:
    """Error of models fitted without the step they are judged by: five folds, every fifth step in turn."""
    errors: list[float] = []
    for fold in range(FOLDS):
        model = fit([s for n, s in enumerate(samples) if n % FOLDS != fold])
        errors += relative_errors(model, [s for n, s in enumerate(samples) if n % FOLDS == fold])
    return FitError(float(np.quantile(errors, 0.5)), float(np.quantile(errors, 0.95)))


def relative_errors(model: Roofline, samples: Sequence[Sample]) -> list[float]:
    """|predicted - measured| / measured of every step."""
    return [abs(model.seconds(s.batch) - s.seconds) / s.seconds for s in samples]


def _features(samples: Sequence[Sample], knee: int) -> Matrix:
    """One row a step, in the order of Roofline's coefficients."""
    return np.array(
        [
            (
                1.0,
                float(b.prefill_tokens > 0),
                max(knee, b.prefill_tokens + b.decodes),
                b.attention,
                b.decodes,
                b.kv_tokens,
            )
            for b in (s.batch for s in samples)
        ],
        dtype=np.float64,
    )


def _solve(rows: Matrix, wanted: Matrix) -> tuple[float, Matrix]:
    """Non-negative x with the least |rows x - wanted|^2, and that residual."""
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0.0] = 1.0
    scaled = rows / scale  # columns of one length: pairs are 1e6 times tokens, and would drown them
    gram, target = scaled.T @ scaled, scaled.T @ wanted
    total = float(wanted @ wanted)
    best, best_residual = np.zeros(FEATURES), total
    for size in range(1, FEATURES + 1):
        for active in combinations(range(FEATURES), size):
            index = np.array(active)
            part = np.linalg.lstsq(gram[np.ix_(index, index)], target[index], rcond=1e-10)[0]
            if (part < 0.0).any():
                continue
            residual = total - 2.0 * part @ target[index] + part @ gram[np.ix_(index, index)] @ part
            # A tie goes to the smaller set, which is tried first: no coefficient without need.
            if residual < best_residual - 1e-12 * total:
                best, best_residual = np.zeros(FEATURES), residual
                best[index] = part
    return best_residual, best / scale
