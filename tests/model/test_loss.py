from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.constants import IGNORE_INDEX
from model.loss import LMHead, sum_losses, tiled_cross_entropy

V, C = 50, 8


def inputs(dtype: torch.dtype = torch.float32, rows: int = 2, seq_len: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, seq_len, C).to(dtype).requires_grad_()
    weight = torch.randn(V, C).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (rows, seq_len))
    labels[0, :3] = IGNORE_INDEX
    labels[1, -1] = IGNORE_INDEX
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


@pytest.mark.parametrize("tokens_per_tile", [1, 4, 7, 26, 1000])
def test_equals_plain_cross_entropy_under_any_scale(tokens_per_tile: int) -> None:
    hidden, weight, labels = inputs(torch.float32)
    scale = torch.rand(labels.shape) * 7  # a different scale per token
    ours = tiled_cross_entropy(hidden, weight, labels, tile_bytes=tokens_per_tile * V * 4)
    theirs = plain(hidden.double(), weight.double(), labels)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad((ours * scale).sum() / 3, (hidden, weight))
    want = torch.autograd.grad((theirs * scale).sum() / 3, (hidden, weight))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_ignored_tokens_have_no_loss_and_no_gradient() -> None:
    hidden, weight, labels = inputs()
    losses = tiled_cross_entropy(hidden, weight, labels)
    assert bool((losses[labels == IGNORE_INDEX] == 0).all())
    losses.sum().backward()
    assert hidden.grad is not None
    assert bool((hidden.grad[labels == IGNORE_INDEX] == 0).all())
    nothing = tiled_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    assert float(nothing.detach().sum()) == 0.0


def test_huge_logits_stay_finite() -> None:
    hidden, weight, labels = inputs()
    losses = tiled_cross_entropy(hidden * 1e4, weight, labels)
    losses.sum().backward()
    assert bool(torch.isfinite(losses).all())
    assert hidden.grad is not None
    assert bool(torch.isfinite(hidden.grad).all())


def test_bf16_sums_the_weight_gradient_in_fp32() -> None:
    """Many small tiles: adding them up in bf16 would lose the small terms."""
    hidden, weight, labels = inputs(torch.bfloat16, rows=2, seq_len=512)
    exact = plain(hidden.double(), weight.double(), labels).sum()
    want = torch.autograd.grad(exact, weight)[0].double()
    one_tile = torch.autograd.grad(tiled_cross_entropy(hidden, weight, labels).sum(), weight)[0].double()
    tiles = torch.autograd.grad(tiled_cross_entropy(hidden, weight, labels, 4 * V * 4).sum(), weight)[0].double()
    assert tiles.dtype == torch.float64
    error = (tiles - want).norm() / want.norm()
    assert error < 1.5 * max(float((one_tile - want).norm() / want.norm()), 2e-3)


def test_no_full_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest product in forward and backward is one tile."""
    largest = 0
    linear = F.linear

    def watch(x: Tensor, w: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, x.shape[0] * w.shape[0])
        return linear(x, w)

    monkeypatch.setattr("model.loss.F.linear", watch)
    hidden, weight, labels = inputs()
    tiled_cross_entropy(hidden, weight, labels, tile_bytes=4 * V * 4).sum().backward()
    assert largest == 4 * V


def test_head_gives_logits_or_losses() -> None:
    hidden, weight, labels = inputs()
    head = LMHead(C, V)
    head.weight.data.copy_(weight)
    assert torch.equal(head(hidden), hidden @ weight.t())
    torch.testing.assert_close(head(hidden, labels), plain(hidden, weight, labels))


def test_sums_and_trailing() -> None:
    seq_len = 6
    positions = torch.stack([torch.arange(seq_len), torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(seq_len)])
    cu_seqlens = torch.tensor([0, 6, 9, 12, 18], dtype=torch.int32)
    labels = torch.ones(3, seq_len, dtype=torch.long)
    labels[:, -1] = IGNORE_INDEX
    labels[2, 3] = IGNORE_INDEX
    losses = torch.where(labels == IGNORE_INDEX, 0.0, torch.arange(18.0).view(3, 6))
    sums = sum_losses(losses, labels, positions, 3, cu_seqlens, seq_len)
    assert float(sums.loss_sum) == float(losses.sum())
    assert int(sums.num_valid) == 14
    # Last three positions of rows 0 and 2 (row 1 holds two documents), ignored labels left out.
    assert float(sums.trailing_sum) == 3 + 4 + 16
    assert int(sums.trailing_valid) == 3
    none = sum_losses(losses, labels, positions, 0, cu_seqlens, seq_len)
    assert (float(none.trailing_sum), int(none.trailing_valid)) == (0.0, 0)
