"""The one table of numerical tolerances.

Errors are relative to the largest value of the expected tensor, or to FLOOR where all of it is smaller (a gradient
that is exactly zero has no relative error).
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-2

# Largest |actual - expected| / max |expected| of an attention output or gradient in this dtype, against float64.
TOL: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max(|expected|, FLOOR), in float64; NaN if either holds one."""
    expected = expected.detach().double()
    error = (actual.detach().double().to(expected.device) - expected).abs().max()
    return float(error / expected.abs().max().clamp(min=FLOOR))


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float | None = None) -> None:
    """Fail unless shapes agree and the error is within `tolerance` (default: TOL of the actual dtype)."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    limit = TOL[actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, expected)
    assert error <= limit, f"{what}: relative error {error:.2e}, allowed {limit:.0e}"  # NaN fails too
