# mypy: disable-error-code="no-untyped-def"
"""The block table on a GPU in two launches instead of some forty. Same result as `blocks.build_block_table`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba.blocks import BlockTable

_PIECE = tl.constexpr(1024)


@triton.jit(do_not_specialize=["num_docs", "block_size"])
def _prefix_kernel(cu_ptr, first_ptr, full_ptr, num_docs, block_size):
    """One program: blocks and full blocks before each document; entry num_docs holds the totals."""
    blocks = tl.zeros([], tl.int32)
    fulls = tl.zeros([], tl.int32)
    for base in tl.range(0, num_docs, _PIECE):
        i = base + tl.arange(0, _PIECE)
        live = i < num_docs
        length = tl.load(cu_ptr + i + 1, mask=live, other=0) - tl.load(cu_ptr + i, mask=live, other=0)
        num = (length + block_size - 1) // block_size
        full = length // block_size
        tl.store(first_ptr + i, blocks + tl.cumsum(num, 0) - num, mask=live)
        tl.store(full_ptr + i, fulls + tl.cumsum(full, 0) - full, mask=live)
        blocks += tl.sum(num, 0)
        fulls += tl.sum(full, 0)
    tl.store(first_ptr + num_docs, blocks)
    tl.store(full_ptr + num_docs, fulls)


@triton.jit
def last_at_most(ptr, n, value, steps):
    """The largest i < n with ptr[i] <= value (0 if none): documents without blocks are skipped."""
    low = tl.zeros_like(value)
    high = low + n
    for _ in tl.range(0, steps):
        middle = (low + high) // 2
        right = tl.load(ptr + middle) <= value
        low = tl.where(right & (high - low > 1), middle, low)
        high = tl.where(right, high, tl.maximum(middle, low + 1))
    return low


@triton.jit(do_not_specialize=["num_docs", "num_tokens", "num_blocks", "num_full", "block_size", "steps"])
def _fill_kernel(
    cu_ptr,
    first_ptr,
    full_ptr,
    own_block_ptr,
    first_block_ptr,
    own_start_ptr,
    block_start_ptr,
    block_len_ptr,
    full_id_ptr,
    full_rank_ptr,
    num_docs,
    num_tokens,
    num_blocks,
    num_full,
    block_size,
    steps,
):
    i = tl.program_id(0) * _PIECE + tl.arange(0, _PIECE)
    # tokens
    doc = last_at_most(cu_ptr, num_docs, i, steps)
    start = tl.load(cu_ptr + doc)
    first = tl.load(first_ptr + doc)
    inner = (i - start) // block_size
    live = i < num_tokens
    tl.store(own_block_ptr + i, first + inner, mask=live)
    tl.store(first_block_ptr + i, first, mask=live)
    tl.store(own_start_ptr + i, start + inner * block_size, mask=live)
    # blocks
    live = i < num_blocks
    used = i < tl.load(first_ptr + num_docs)
    doc = last_at_most(first_ptr, num_docs, i, steps)
    inner = i - tl.load(first_ptr + doc)
    begin = tl.load(cu_ptr + doc) + inner * block_size
    length = tl.minimum(tl.load(cu_ptr + doc + 1) - begin, block_size)
    tl.store(block_start_ptr + i, tl.where(used, begin, num_tokens), mask=live)
    tl.store(block_len_ptr + i, tl.where(used, length, 0), mask=live)
    rank = tl.where(used & (length == block_size), tl.load(full_ptr + doc) + inner, -1)
    tl.store(full_rank_ptr + i, rank, mask=live)
    # full blocks by rank
    doc = last_at_most(full_ptr, num_docs, i, steps)
    block = tl.load(first_ptr + doc) + i - tl.load(full_ptr + doc)
    used = i < tl.load(full_ptr + num_docs)
    tl.store(full_id_ptr + i, tl.where(used, block, -1), mask=i < num_full)


def build(cu_seqlens: Tensor, num_tokens: int, block_size: int) -> BlockTable:
    """Tables for documents `cu_seqlens` (int32 [N + 1], from 0 to num_tokens). No host synchronisation."""
    num_docs = cu_seqlens.numel() - 1
    num_blocks, num_full = num_tokens // block_size + num_docs, num_tokens // block_size
    cu_seqlens = cu_seqlens.contiguous()
    per_doc = torch.empty((2, num_docs + 1), dtype=torch.int32, device=cu_seqlens.device)
    sizes = {
        "own_block": num_tokens,
        "first_block": num_tokens,
        "own_start": num_tokens,
        "block_start": num_blocks,
        "block_len": num_blocks,
        "full_id": num_full,
        "full_rank": num_blocks,
    }
    # one allocation; every piece starts at 16 bytes, as kernels that take these pointers were compiled for
    padded = [common.ceil_div(size, 4) * 4 for size in sizes.values()]
    memory = torch.empty(sum(padded), dtype=torch.int32, device=cu_seqlens.device)
    pieces = zip(sizes.items(), memory.split(padded), strict=True)
    fields = {name: piece[:size] for (name, size), piece in pieces}
    _prefix_kernel[(1,)](cu_seqlens, per_doc[0], per_doc[1], num_docs, block_size, num_warps=4)
    _fill_kernel[(common.ceil_div(max(num_tokens, num_blocks), _PIECE.value),)](
        cu_seqlens,
        per_doc[0],
        per_doc[1],
        *fields.values(),
        num_docs,
        num_tokens,
        num_blocks,
        num_full,
        block_size,
        num_docs.bit_length() + 1,
        num_warps=4,
    )
    return BlockTable(block_size=block_size, num_tokens=num_tokens, cu_seqlens=cu_seqlens, **fields)
