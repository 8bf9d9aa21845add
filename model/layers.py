"""Norm and MLP of a Llama-shaped block.

Shape legend: R rows, S seq_len, C hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.execution import PLAIN, Execution
from model.tiled_mlp import tiled_mlp


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, accumulated in fp32 whatever the input's dtype."""

    def __init__(self, size: int, eps: float, execution: Execution = PLAIN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.rms_norm = eps, execution.pieces.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), whole or over tiles of tokens."""

    def __init__(self, hidden_size: int, intermediate_size: int, execution: Execution = PLAIN) -> None:
        super().__init__()
        self.tile, self.pieces = execution.mlp_tile, execution.pieces
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_RSC: Tensor) -> Tensor:
        if self.tile:
            weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
            return tiled_mlp(x_RSC, *weights, self.tile, self.pieces)
        return self.down_proj(self.pieces.silu_mul(self.gate_proj(x_RSC), self.up_proj(x_RSC)))
