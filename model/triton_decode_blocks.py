# mypy: disable-error-code="no-untyped-def"
"""Decode attention of MoBA: one new token per row against the blocks each query head chose, where they lie.

As `model.triton_decode`, with a list of blocks in place of all keys. Query heads of a group choose blocks of their
own, so each is a program of its own: no keys are shared, and no matrix product is worth its while for one query.

Shape legend: R rows, L capacity, H query heads, Hkv key heads, G = H / Hkv, D head_dim, K listed blocks, N splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.triton_decode import Split, merge, multiprocessors, num_splits

_LOW = tl.constexpr(-1.0e30)  # running maximum before the first key: finite, so that nothing is inf - inf
TILE = Split(keys=16, warps=4, stages=1, programs=3) if common.INTERPRETED else Split(64, 4, 3, 8)


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads", "num_splits", "K"])
def _listed_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    last_ptr,
    ids_ptr,
    part_ptr,
    lse_ptr,
    scale_log2,
    row_stride,
    block_size,
    num_heads,
    num_kv_heads,
    num_splits,
    K,
    KEYS: tl.constexpr,  # divides block_size
    D: tl.constexpr,
):
    """Program = (query head, split, row): a run of the tiles of the listed blocks."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    length = (tl.load(last_ptr + row) + 1).to(tl.int32)
    per_block = block_size // KEYS
    run = tl.cdiv(K * per_block, num_splits)
    begin = split * run
    end = tl.minimum(begin + run, K * per_block)
    d = tl.arange(0, D)
    n = tl.arange(0, KEYS)
    query = row * num_heads + head
    q = tl.load(q_ptr + query * D + d).to(tl.float32) * scale_log2
    base = row * row_stride + (head // (num_heads // num_kv_heads)) * D
    top = tl.full([], _LOW, tl.float32)
    total = tl.zeros([], tl.float32)
    out = tl.zeros([D], tl.float32)
    for t in tl.range(begin, end):
        block = tl.load(ids_ptr + query * K + t // per_block)
        at = tl.maximum(block, 0) * block_size + (t % per_block) * KEYS + n
        live = (block >= 0) & (at < length)
        where = base + at.to(tl.int64)[:, None] * (num_kv_heads * D) + d[None, :]
        k = tl.load(k_ptr + where, mask=live[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + where, mask=live[:, None], other=0.0).to(tl.float32)
        score = tl.where(live, tl.sum(k * q[None, :], 1), float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        p = tl.exp2(score - new_top)
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, 0)
        out = out * decay + tl.sum(p[:, None] * v, 0)
        top = new_top
    seen = tl.where(total > 0, total, 1.0)
    to = query * num_splits + split
    tl.store(part_ptr + to * D + d, out / seen)
    tl.store(lse_ptr + to, tl.where(total > 0, top + tl.log2(seen), float("-inf")))


def attend(
    q_RHD: Tensor,
    k_RLHD: Tensor,
    v_RLHD: Tensor,
    last_R: Tensor,
    ids_RHK: Tensor,
    block_size: int,
    *,
    softmax_scale: float | None = None,
    tile: Split = TILE,
) -> Tensor:
    """Attention of one query per row to the tokens up to `last` of its listed blocks, [R, H, D]. Inference only.

    Args:
        q_RHD, k_RLHD, v_RLHD, last_R: as in `model.triton_decode.attend`.
        ids_RHK: int32 [R, H, K], distinct numbers of blocks within the row, -1 = none; one of each query's blocks
            must have a token.
        block_size: a multiple of 16.
        softmax_scale: None: 1 / sqrt(D).
    """
    R, H, D = q_RHD.shape
    Hkv, K, device = k_RLHD.shape[2], ids_RHK.shape[-1], q_RHD.device
    keys = min(tile.keys, block_size & -block_size)  # the largest power of two that divides the block
    splits = num_splits(R * H, K * block_size, multiprocessors(device), tile)
    part = torch.empty((R, H, splits, 1, D), dtype=torch.float32, device=device)
    lse = torch.empty((R, H, splits, 1), dtype=torch.float32, device=device)
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    _listed_kernel[(H, splits, R)](
        q_RHD.contiguous(),
        k_RLHD,
        v_RLHD,
        last_R,
        ids_RHK.contiguous(),
        part,
        lse,
        scale * common.LOG2E,
        k_RLHD.stride(0),
        block_size,
        H,
        Hkv,
        splits,
        K,
        KEYS=keys,
        D=D,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return merge(part, lse, torch.empty((R, H, D), dtype=q_RHD.dtype, device=device))
