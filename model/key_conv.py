"""Key convolution: a short causal mix of neighbouring keys that lets block means tell blocks apart better.

From "Optimizing Mixture of Block Attention" (arXiv 2511.11571): per channel, causal, kernel 3 or 5, SiLU,
residual: k'_t = k_t + silu(sum over lags l of w_l * k_(t - l)).

It runs right after the key projection, before qk-norm and RoPE: the norm keeps its meaning, and a sum of keys
rotated by different angles would no longer depend on relative positions alone.

Shape legend: T tokens, Hkv kv heads, D head_dim, W kernel_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError

KERNEL_SIZES = (3, 5)


class KeyConv(nn.Module):
    """Depthwise causal convolution of keys within each document, [T, Hkv, D] -> [T, Hkv, D].

    `weight[l]` [Hkv, D] multiplies the key `l` tokens back. All zeros at first, which makes the module the
    identity; its gradient is not zero there (silu'(0) = 1/2), so it trains from that point.

    Raises:
        UserError: a kernel size other than 3 or 5.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size not in KERNEL_SIZES:
            raise UserError(f"model.key_conv={kernel_size}: the kernel size is 3 or 5, or 0 for no convolution")
        self.weight = nn.Parameter(torch.zeros(kernel_size, num_kv_heads, head_dim))

    def forward(self, k_THD: Tensor, positions_T: Tensor) -> Tensor:
        """Keys before qk-norm and RoPE; `positions_T` int64 [T] counts from 0 at each document start."""
        mixed = self.weight[0] * k_THD
        for lag in range(1, min(self.weight.shape[0], k_THD.shape[0])):
            back = F.pad(k_THD[:-lag], (0, 0, 0, 0, lag, 0))
            inside = (positions_T >= lag)[:, None, None]  # a token never sees the document before its own
            # where, not a product: NaN of another document must not leak through 0 * NaN
            mixed = mixed + self.weight[lag] * torch.where(inside, back, 0)
        return k_THD + F.silu(mixed)
