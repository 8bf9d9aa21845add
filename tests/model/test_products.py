"""Products whose weight gradients go straight into fp32 sums: against autograd's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.embedding import Embedding
from model.fused_loss import fused_cross_entropy
from model.products import Branches, Joint, Linear, place_gradient
from tests.tolerances import assert_close

ROWS, WIDE, OUT = 24, 16, (12, 8, 8)


class Sum:
    """As an optimizer has it; what an earlier step left is not a number."""

    def __init__(self, total: Tensor) -> None:
        self.total, self.started = total.fill_(torch.nan), False

    def begin(self) -> bool:
        first, self.started = not self.started, True
        return first


def parts(seed: int = 0) -> list[Linear]:
    torch.manual_seed(seed)
    return [Linear(WIDE, out, bias=False) for out in OUT]


def give_sums(linears: list[Linear]) -> list[Sum]:
    sums = [Sum(torch.empty(linear.weight.shape)) for linear in linears]
    for linear, into in zip(linears, sums, strict=True):
        place_gradient(linear.weight, into)
    return sums


def run(linears: list[Linear], how: str, seed: int) -> Tensor:
    """Backward of one micro-batch; returns the input's gradient."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, ROWS, WIDE, generator=draw, requires_grad=True)
    outs = Branches(*linears)(x) if how == "branches" else tuple(linear(x) for linear in linears)
    torch.cat(outs, -1).backward(torch.randn(2, ROWS, sum(OUT), generator=draw))
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("how", ["one by one", "branches"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_equals_autograd(how: str, micro_batches: int) -> None:
    plain, summed = parts(), parts()
    sums = give_sums(summed)
    for seed in range(micro_batches):
        assert_close(run(summed, how, seed), run(plain, "one by one", seed), "input", tolerance=1e-6)
    for ours, theirs, into in zip(summed, plain, sums, strict=True):
        assert ours.weight.grad is None and theirs.weight.grad is not None
        assert_close(into.total, theirs.weight.grad, "weight", tolerance=1e-6)


def test_without_a_sum_or_with_a_bias_it_is_a_plain_linear() -> None:
    plain = Linear(WIDE, 4)
    place_gradient(plain.weight, into := Sum(torch.empty(4, WIDE)))
    plain(torch.randn(3, WIDE)).sum().backward()
    assert plain.weight.grad is not None and plain.bias.grad is not None and not into.started
    mixed = parts()
    (into, *_) = give_sums(mixed[:1])
    run(mixed, "branches", 0)
    assert into.started and all(linear.weight.grad is not None for linear in mixed[1:])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_joint(micro_batches: int) -> None:
    plain, linears = parts(), parts()
    flat = torch.cat([linear.weight.detach() for linear in linears])
    for linear, piece in zip(linears, flat.split(OUT), strict=True):
        linear.weight.data = piece
    joint, into = Joint(*linears), Sum(torch.empty(flat.shape))
    assert not joint.is_joined and not list(joint.parameters())
    with pytest.raises(RuntimeError, match="not been joined"):
        joint(torch.zeros(1, WIDE))
    joint.join(flat, into)
    for seed in range(micro_batches):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(2, ROWS, WIDE, generator=draw, requires_grad=True)
        out = joint(x)
        assert_close(out, torch.cat([linear(x) for linear in plain], -1), "output", tolerance=1e-6)
        out.backward(torch.randn(2, ROWS, sum(OUT), generator=draw))
        assert x.grad is not None
        assert_close(x.grad, run(plain, "one by one", seed), "input", tolerance=1e-6)
    want = torch.cat([linear.weight.grad for linear in plain if linear.weight.grad is not None])
    assert_close(into.total, want, "weights", tolerance=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_embedding_and_head_of_one_weight(device: str) -> None:
    """The head's gradient, scaled by what comes from above, then the embedding's; tokens repeat."""
    vocab, ids = 11, torch.tensor([[1, 4, 4, 0], [4, 9, 1, 10]], device=device)
    found = []
    for summed in (False, True):
        torch.manual_seed(0)
        table = Embedding(vocab, WIDE)
        table.to(device)
        into = Sum(torch.empty(vocab, WIDE, device=device))
        if summed:
            place_gradient(table.weight, into)
        for _ in range(2):
            hidden = table(ids).tanh()
            (fused_cross_entropy(hidden, table.weight, ids.roll(1))[0] * 0.3).backward()
        assert (table.weight.grad is None) == summed
        found.append(into.total if summed else table.weight.grad)
    want, got = found
    assert want is not None and got is not None
    assert_close(got, want, "tied weight", tolerance=1e-5)
