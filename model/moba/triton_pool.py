# mypy: disable-error-code="no-untyped-def"
"""Mean key of every full block, in fp32 arithmetic. Shape legend: triton_common.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba.blocks import BlockTable

# Few programs wait for memory and not for its bandwidth: up to so many, each takes a part of the columns.
_PROGRAMS = 1024
_MOST_PARTS = 4


@triton.jit(do_not_specialize=["num_blocks", "num_kv_heads"])
def _pool_kernel(
    k_ptr,
    high_ptr,
    low_ptr,
    block_start_ptr,
    block_len_ptr,
    block_size,
    num_blocks,
    num_kv_heads,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
    LOW: tl.constexpr,
):
    """Program = (block, key head, COLS of its D). A block that is not full gets zeros: nobody may choose it."""
    head = tl.program_id(0) % num_kv_heads
    block = tl.program_id(0) // num_kv_heads
    i = tl.arange(0, ROWS)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    if tl.load(block_len_ptr + block) == block_size:
        start = tl.load(block_start_ptr + block)
        for j in tl.range(0, block_size, ROWS):
            row = (start + j + i).to(tl.int64) * num_kv_heads + head
            k = tl.load(k_ptr + row[:, None] * D + d[None, :], mask=(j + i < block_size)[:, None], other=0.0)
            total += tl.sum(k.to(tl.float32), 0)
    mean = total / block_size
    out = (head.to(tl.int64) * num_blocks + block) * D + d
    high = mean.to(high_ptr.dtype.element_ty)
    tl.store(high_ptr + out, high)
    if LOW:
        tl.store(low_ptr + out, (mean - high.to(tl.float32)).to(low_ptr.dtype.element_ty))


def block_means(k_THD: Tensor, table: BlockTable) -> tuple[Tensor, Tensor | None]:
    """fp32 means of the keys of full blocks as a sum of two parts in k's dtype.

    Args:
        k_THD: [T, Hkv, D] contiguous.

    Returns:
        high [Hkv, NB, D] and the remainder low [Hkv, NB, D] (None for fp32 keys, where high is the mean).
        With bf16 the two carry 16 bits of the mean, while q is exact: scores come close to fp32 ones.
    """
    Hkv, D = k_THD.shape[1:]
    rows = min(256, common.next_power_of_two(table.block_size))  # few programs: many bytes in flight in each
    NB = table.block_start.numel()
    high = torch.empty((Hkv, NB, D), dtype=k_THD.dtype, device=k_THD.device)
    low = None if k_THD.dtype == torch.float32 else torch.empty_like(high)
    parts = min(_MOST_PARTS, _PROGRAMS // (NB * Hkv))
    cols = D >> max(0, parts.bit_length() - 1)
    _pool_kernel[(NB * Hkv, D // cols)](
        k_THD,
        high,
        high if low is None else low,
        table.block_start,
        table.block_len,
        table.block_size,
        NB,
        Hkv,
        ROWS=rows,
        D=D,
        COLS=cols,
        LOW=low is not None,
        num_warps=8 if rows >= 128 else 4,
    )
    return high, low
