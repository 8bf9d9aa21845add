"""Flash-attention 2 for packed sequences: the package where installed, else the copy inside CUDA torch.

Both are the same kernels, reached below their autograd wrappers so that callers can merge several calls into one
softmax. Half precision on CUDA only; grouped heads are read in place.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

MAX_HEAD_DIM = 256


class FlashKernels(Protocol):
    """Variable-length attention over q [Tq, H, D], k and v [Tk, Hkv, D]; lse is fp32 [H, Tq], natural log."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
        max_q: int, max_k: int, *, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


class PackageKernels:
    """flash_attn >= 2.7 (`flash_attn_interface`, written against 2.8)."""

    def __init__(self) -> None:
        from flash_attn import flash_attn_interface

        self._ops: Any = flash_attn_interface

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See FlashKernels."""
        out, lse, _, _ = self._ops._flash_attn_varlen_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal
        )  # fmt: skip
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
        max_q: int, max_k: int, *, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See FlashKernels."""
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        self._ops._flash_attn_varlen_backward(
            do, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, 0.0, scale, causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=True,
        )  # fmt: skip
        return dq, dk, dv


class TorchKernels:
    """The flash-attention 2 that CUDA builds of torch carry (what `torch.nn.attention.varlen` calls).

    The last bits of dq vary from run to run (atomics) unless `torch.use_deterministic_algorithms(True)`.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See FlashKernels."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale
        )
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
        max_q: int, max_k: int, *, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See FlashKernels."""
        rng = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout state, unused at rate 0
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, rng, unused, scale=scale
        )
        return dq, dk, dv


def find(q: Tensor) -> FlashKernels | None:
    """Kernels that take these queries, or None."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    if q.shape[-1] % 8 or q.shape[-1] > MAX_HEAD_DIM or torch.cuda.get_device_capability(q.device) < (8, 0):
        return None
    return _kernels()


@cache
def _kernels() -> FlashKernels | None:
    try:
        return PackageKernels()
    except ImportError:
        pass
    return TorchKernels() if torch.backends.cuda.is_flash_attention_available() else None
