"""Inputs and helpers of the MoBA tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NAMES = ("out", "dq", "dk", "dv")


def borders(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens of documents of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make_qkv(
    tokens: int, heads: int, kv_heads: int, dim: int = 16, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose block scores come out equal in fp32 and float64, ties included.

    q is a multiple of 1/4 and k of 3/4, so for blocks of 16, 32, 48, 64, 96... tokens every mean, product and sum
    of a score is exact in fp32: the choice of blocks cannot depend on the precision.
    """
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-5, 6, (tokens, heads, dim), generator=g) / 4
    k = torch.randint(-2, 3, (tokens, kv_heads, dim), generator=g) * 0.75
    v = torch.randn((tokens, kv_heads, dim), generator=g)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: Sequence[Tensor], seed: int = 1
) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) for a fixed random output gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attention(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    out.backward(weight.to(out))
    grads = [x.grad for x in leaves]
    assert all(g is not None for g in grads)
    return (out.detach(), *(g for g in grads if g is not None))
