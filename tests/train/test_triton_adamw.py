"""AdamW in one pass: against PyTorch's own, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from train.triton_adamw import adamw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE, LR, BETAS, EPS, DECAY = 2_500, 1e-2, (0.9, 0.95), 1e-8, 0.1


class Ours:
    """Weights, moments and copy on the device."""

    def __init__(self, weights: Tensor) -> None:
        self.master, self.copy = weights.clone(), torch.zeros_like(weights, dtype=torch.bfloat16)
        self.mean, self.square = torch.zeros_like(weights), torch.zeros_like(weights)
        self.count = torch.zeros((), device=weights.device)

    def step(self, grad: Tensor, norm: Tensor, limit: float) -> None:
        adamw(
            self.master, grad, self.mean, self.square, self.copy, self.count, norm, lr=LR, betas=BETAS, eps=EPS,
            weight_decay=DECAY, limit=limit,
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.master, self.copy, self.mean, self.square, self.count


def draw(seed: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("limit", [0.0, 1.0, 1e6])
def test_equals_pytorchs(limit: float) -> None:
    """Clipped, not clipped because small, and without clipping; three steps."""
    start = draw(0)
    param = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([param], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    ours = Ours(start)
    for step in range(1, 4):
        grad = draw(step) * step
        norm = grad.norm()
        param.grad = grad * (min(1.0, limit / float(norm + 1e-6)) if limit else 1.0)
        theirs.step()
        ours.step(grad, norm, limit)
        state = theirs.state[param]
        for got, want in (
            (ours.master, param.detach()),
            (ours.mean, state["exp_avg"]),
            (ours.square, state["exp_avg_sq"]),
        ):
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7)
        # The interpreter cuts digits off where a GPU rounds to nearest.
        torch.testing.assert_close(
            ours.copy.float(), ours.master, rtol=2**-8 if DEVICE == "cuda" else 2**-7, atol=0
        )
        assert float(ours.count) == step
    assert float((ours.master - start).abs().min()) > 0


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(norm: float) -> None:
    ours = Ours(draw(0))
    ours.step(draw(1), draw(1).norm(), 1.0)
    before = [tensor.clone() for tensor in ours.tensors]
    ours.step(draw(2), torch.tensor(norm, device=DEVICE), 1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, ours.tensors, strict=True))
