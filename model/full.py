"""Exact causal attention within each packed document.

Shape legend: T tokens, N documents, S tokens per document, H query heads, Hkv key heads, D head dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from model import flash

# Fastest first on Hopper; each is passed over by torch where it does not support the inputs.
_SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Under torch.use_deterministic_algorithms: cuDNN and the efficient kernel sum gradients in any order.
_DETERMINISTIC = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
BLOCK, MOST_BLOCKS = 4096, 64  # of MoBA as full attention; lists of more blocks take too much memory


def full_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    cu_seqlens_host: Sequence[int] | None = None,
) -> Tensor:
    """Causal attention, out [T, H, D]. KV is not expanded to the query heads by this function.

    Documents of one length (one document above all) go through one batched SDPA call. Others run on
    flash-attention on a GPU in half precision, else document by document. Under
    `torch.use_deterministic_algorithms` gradients too are bit-equal from run to run, on a GPU by slower ways.

    Args:
        q_THD: [T, H, D]; k_THD, v_THD: [T, Hkv, D], H a multiple of Hkv.
        cu_seqlens: int32 [N + 1] document borders from 0 to T, on the device of q.
        max_seqlen: longest document, or any larger number; exact is faster.
        softmax_scale: None: 1 / sqrt(D).
        cu_seqlens_host: the same borders as Python integers. Only documents of unequal length outside
            flash-attention need them; without them that case waits for the device.

    Raises:
        ValueError: `max_seqlen` is smaller than some document must be.
    """
    num_tokens, num_docs = q_THD.shape[0], cu_seqlens.numel() - 1
    scale = 1 / math.sqrt(q_THD.shape[-1]) if softmax_scale is None else softmax_scale
    if num_docs * max_seqlen < num_tokens:
        raise ValueError(f"max_seqlen={max_seqlen}: longer documents among the {num_docs} in {num_tokens} tokens")
    if torch.are_deterministic_algorithms_enabled() and _by_blocks(q_THD, min(max_seqlen, num_tokens)):
        return _all_blocks(q_THD, k_THD, v_THD, cu_seqlens, min(max_seqlen, num_tokens), scale)
    if num_docs * max_seqlen == num_tokens or num_docs == 1:  # then every document has the same length
        return _sdpa(q_THD, k_THD, v_THD, num_docs, scale)
    kernels = flash.find(q_THD)
    if kernels is not None:
        out: Tensor = _FlashVarlen.apply(
            q_THD, k_THD, v_THD, cu_seqlens, min(max_seqlen, num_tokens), scale, kernels
        )
        return out
    borders = cu_seqlens.tolist() if cu_seqlens_host is None else cu_seqlens_host
    lengths = [b - a for a, b in itertools.pairwise(borders) if b > a]
    if len(set(lengths)) == 1:
        return _sdpa(q_THD, k_THD, v_THD, len(lengths), scale)
    pieces = zip(q_THD.split(lengths), k_THD.split(lengths), v_THD.split(lengths), strict=True)
    return torch.cat([_sdpa(q, k, v, 1, scale) for q, k, v in pieces])


def _by_blocks(q_THD: Tensor, longest: int) -> bool:
    """Whether MoBA's kernels take these queries, with all blocks chosen: sums in a fixed order, and half the time
    of flash-attention 2 with that property."""
    if q_THD.device.type != "cuda" or longest > MOST_BLOCKS * BLOCK:
        return False
    from model.dispatch import resolve_backend

    shape = {"head_dim": q_THD.shape[-1], "block_size": BLOCK}
    return resolve_backend("auto", device=q_THD.device, dtype=q_THD.dtype, **shape).name == "triton"


def _all_blocks(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> Tensor:
    from model.moba.api import moba_attention  # which imports this module

    return moba_attention(
        q, k, v, block_size=BLOCK, topk=-(-longest // BLOCK), cu_seqlens=cu_seqlens, max_seqlen=longest,
        softmax_scale=scale, backend="triton",
    )  # fmt: skip


def _sdpa(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, num_docs: int, scale: float) -> Tensor:
    """Documents of equal length as a batch: [T, H, D] -> [N, H, S, D] and back."""
    q, k, v = (x.unflatten(0, (num_docs, -1)).transpose(1, 2) for x in (q_THD, k_THD, v_THD))
    grouped = q_THD.shape[1] != k_THD.shape[1]
    if q.device.type == "cpu":
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        order = _DETERMINISTIC if torch.are_deterministic_algorithms_enabled() else _SDPA_ORDER
        with sdpa_kernel(order, set_priority=True):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(q_THD.shape)


class _FlashVarlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        kernels: flash.FlashKernels,
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = kernels.forward(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.max_seqlen, ctx.scale, ctx.kernels = max_seqlen, scale, kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu = ctx.saved_tensors
        longest = ctx.max_seqlen
        grads = ctx.kernels.backward(
            do.contiguous(), q, k, v, out, lse, cu, cu, longest, longest, causal=True, scale=ctx.scale
        )
        return *grads, None, None, None, None
