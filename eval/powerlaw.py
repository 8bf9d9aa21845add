"""Power law of position-wise loss: L(p) = c + a * p^-b, with c = 0 unless asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """L(p) = offset + scale * p^-exponent, p in tokens; `rmse` in nats (weighted by tokens)."""

    scale: float
    exponent: float
    offset: float
    rmse: float


def fit_power_law(
    positions: Sequence[float],
    losses: Sequence[float],
    weights: Sequence[float] | None = None,
    offset: bool = False,
) -> PowerLaw | None:
    """Weighted least squares in loss. None with fewer than three points (four with an offset).

    For a given exponent the other parameters are linear, so only the exponent is searched (golden section
    after a grid: the error has one minimum in practice, but the grid does not rely on it).
    """
    if len(positions) < (4 if offset else 3):
        return None
    p = np.asarray(positions, dtype=np.float64)
    y = np.asarray(losses, dtype=np.float64)
    w = np.ones_like(y) if weights is None else np.asarray(weights, dtype=np.float64)
    w = w / w.sum()

    def solve(exponent: float) -> tuple[float, float, float]:
        x = p**-exponent
        if offset:
            x_mean, y_mean = (w * x).sum(), (w * y).sum()
            spread = (w * (x - x_mean) ** 2).sum()
            scale = (w * (x - x_mean) * (y - y_mean)).sum() / spread if spread > 0 else 0.0
            shift = y_mean - scale * x_mean
            if shift >= 0:
                return scale, shift, float((w * (y - shift - scale * x) ** 2).sum())
        scale = (w * x * y).sum() / (w * x * x).sum()
        return scale, 0.0, float((w * (y - scale * x) ** 2).sum())

    grid = np.linspace(-0.5, 2.0, 251)
    errors = [solve(float(b))[2] for b in grid]
    best = int(np.argmin(errors))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    ratio = (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if solve(left)[2] <= solve(right)[2]:
            high = right
        else:
            low = left
    exponent = (low + high) / 2
    scale, shift, error = solve(exponent)
    return PowerLaw(float(scale), exponent, float(shift), error**0.5)
