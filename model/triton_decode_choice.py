# mypy: disable-error-code="no-untyped-def"
"""MoBA's gate while decoding: which past blocks each query head of one new token per row reads.

Two launches, whose shapes do not depend on lengths: scores of all complete blocks, then the best of each head.

Shape legend: R rows, H query heads, Hkv key heads, G = H / Hkv, D head_dim, N complete blocks of the longest row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common

MOST_BLOCKS = 16384  # of a row: all its scores of a head lie in the registers of one program
_BLOCKS = 32  # per program that scores
_IN_REGISTERS = 32  # scores per thread


@triton.jit(do_not_specialize=["num_blocks", "num_kv_heads", "row_stride"])
def _score_kernel(
    q_ptr,
    mean_ptr,
    last_ptr,
    score_ptr,
    block_size,
    num_blocks,
    num_kv_heads,
    row_stride,
    G: tl.constexpr,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
):
    """Program = (BLOCKS blocks, key head, row): q . mean(k) of the G heads; -inf: the block is not in the past."""
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    own = (tl.load(last_ptr + row) // block_size).to(tl.int32)
    n = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    d = tl.arange(0, D)
    past = (n < own) & (n < num_blocks)
    at = row * row_stride + (n * num_kv_heads + head)[:, None] * D + d[None, :]
    mean = tl.load(mean_ptr + at, mask=past[:, None], other=0.0)
    for g in tl.static_range(G):  # no matrix product takes fp32 as it is
        query = (row * num_kv_heads + head) * G + g
        q = tl.load(q_ptr + query * D + d).to(tl.float32)
        score = tl.where(past, tl.sum(mean * q[None, :], 1), float("-inf"))
        tl.store(score_ptr + query * num_blocks + n, score, mask=n < num_blocks)


@triton.jit(do_not_specialize=["num_blocks", "num_heads", "num_past"])
def _best_kernel(score_ptr, last_ptr, ids_ptr, block_size, num_blocks, num_heads, num_past, BLOCKS: tl.constexpr):
    """Program = (row, query head): the own block, then the best; of equal scores the lowest block."""
    i = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCKS)
    score = tl.load(score_ptr + i * num_blocks + n, mask=n < num_blocks, other=float("-inf"))
    to = ids_ptr + i * (num_past + 1)
    tl.store(to, (tl.load(last_ptr + i // num_heads) // block_size).to(tl.int32))
    for slot in tl.range(0, num_past):
        best = tl.max(score, 0)
        block = tl.min(tl.where(score == best, n, BLOCKS), 0)
        tl.store(to + 1 + slot, tl.where(best > float("-inf"), block, -1))
        score = tl.where(n == block, float("-inf"), score)


def choose(q_RHD: Tensor, means_RNHD: Tensor, last_R: Tensor, block_size: int, topk: int) -> Tensor:
    """Blocks that each query head reads, int32 [R, H, topk]: its own, then the best past ones; -1 = none.

    Args:
        q_RHD: [R, H, D].
        means_RNHD: fp32 [R, N, Hkv, D], only rows may be strided; N at most MOST_BLOCKS. `last` decides which of a
            row's blocks are past.
        last_R: int64 [R], on the device: the position of each row's query.
    """
    R, H, D = q_RHD.shape
    N, Hkv = means_RNHD.shape[1:3]
    score = torch.empty((R, H, N), dtype=torch.float32, device=q_RHD.device)
    ids = torch.empty((R, H, topk), dtype=torch.int32, device=q_RHD.device)
    _score_kernel[(common.ceil_div(N, _BLOCKS), Hkv, R)](
        q_RHD.contiguous(),
        means_RNHD,
        last_R,
        score,
        block_size,
        N,
        Hkv,
        means_RNHD.stride(0),
        G=H // Hkv,
        BLOCKS=_BLOCKS,
        D=D,
        num_warps=4,
    )
    padded = common.next_power_of_two(N)
    warps = min(16, max(1, padded // (32 * _IN_REGISTERS)))
    _best_kernel[(R * H,)](score, last_R, ids, block_size, N, H, topk - 1, BLOCKS=padded, num_warps=warps)
    return ids
