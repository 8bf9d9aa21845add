"""SwiGLU MLP over tiles of tokens. Nothing as wide as the MLP outlives a tile, in forward or backward.

Forward keeps only the input; backward computes each tile's gate and up once more. Weight gradients add up in fp32
over the tiles. All of it is one operation of one module: how many tiles a rank has is its own affair, no
communication happens in between (under ZeRO-3 the MLP must gather its weights as a unit, see `train.engine`).

Shape legend: T tokens, C hidden_size, I intermediate_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fused import Pieces
from model.hold import Held, hold
from model.products import add_product


def tiled_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, tile: int, pieces: Pieces) -> Tensor:
    """down(silu(gate x) * up x), shape and dtype of x [..., C].

    Args:
        gate, up: [I, C]; down: [C, I].
        tile: tokens at a time.
    """
    (flat,), held = hold(x.reshape(-1, x.shape[-1]))
    out: Tensor = _TiledMLP.apply(flat, gate, up, down, held, tile, pieces)
    return out.view(x.shape)


class _TiledMLP(torch.autograd.Function):
    """The input is taken from `held`, not saved here: under activation checkpointing the recomputation then stops
    before this forward, whose output nobody needs again. Weights are kept as parameters, since ZeRO-3 exchanges
    what is inside them."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TC: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        held: Held,
        tile: int,
        pieces: Pieces,
    ) -> Tensor:
        ctx.weights, ctx.held, ctx.tile, ctx.pieces = (gate, up, down), held, tile, pieces
        out_TC = torch.empty_like(x_TC)
        for start in range(0, x_TC.shape[0], tile):
            x = x_TC[start : start + tile]
            inner = pieces.silu_mul(F.linear(x, gate), F.linear(x, up))
            torch.matmul(inner, down.t(), out=out_TC[start : start + tile])
        return out_TC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor | None, ...]:
        (x_TC,) = ctx.held.take()
        weights = gate, up, down = ctx.weights
        grad_TC = grad_TC.contiguous()
        needed = ctx.needs_input_grad[1:4]
        sums: list[Tensor | None] = [None, None, None]
        grad_x = torch.empty_like(x_TC)
        for start in range(0, x_TC.shape[0], ctx.tile):
            rows = slice(start, start + ctx.tile)
            x, grad = x_TC[rows], grad_TC[rows]
            g, u = F.linear(x, gate), F.linear(x, up)
            if needed[2]:
                sums[2] = add_product(sums[2], grad, ctx.pieces.silu_mul(g, u))
            d_gate, d_up = ctx.pieces.silu_mul_gradients(g, u, grad @ down)
            if needed[0]:
                sums[0] = add_product(sums[0], d_gate, x)
            if needed[1]:
                sums[1] = add_product(sums[1], d_up, x)
            torch.matmul(d_gate, gate, out=grad_x[rows])
            grad_x[rows].addmm_(d_up, up)
        grads = (None if total is None else total.to(w.dtype) for total, w in zip(sums, weights, strict=True))
        return grad_x, *grads, None, None, None
