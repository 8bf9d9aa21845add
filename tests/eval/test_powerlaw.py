from __future__ import annotations

import pytest

from eval.powerlaw import fit_power_law

POSITIONS = [64.0 * (i + 0.5) for i in range(16)]


@pytest.mark.parametrize(("scale", "exponent", "offset"), [(5.0, 0.08, 0.0), (3.0, 0.5, 0.0), (4.0, 0.3, 1.5)])
def test_recovers_a_known_law(scale: float, exponent: float, offset: float) -> None:
    losses = [offset + scale * p**-exponent for p in POSITIONS]
    law = fit_power_law(POSITIONS, losses, offset=offset > 0)
    assert law is not None
    assert (law.scale, law.exponent, law.offset) == pytest.approx((scale, exponent, offset), rel=1e-4, abs=1e-4)
    assert law.rmse < 1e-6


def test_weights_decide_between_contradictory_points() -> None:
    losses = [2.0 * p**-0.2 for p in POSITIONS]
    losses[3] += 1.0
    law = fit_power_law(POSITIONS, losses, [1e-9 if i == 3 else 1.0 for i in range(16)])
    assert law is not None and law.exponent == pytest.approx(0.2, abs=1e-3)


def test_too_few_points() -> None:
    assert fit_power_law([1.0, 2.0], [1.0, 2.0]) is None
    assert fit_power_law([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], offset=True) is None
