# mypy: disable-error-code="no-untyped-def"
"""Decode attention of MoBA: one new token per row against the blocks its query heads chose, where they lie.

As `model.triton_decode`, with a list of blocks in place of all keys. Query heads of a group choose blocks of their
own, and what several of them chose is read once: a first kernel lists the blocks of each group and who chose them,
and the G heads are the rows of one small matrix product, of which those that did not choose a block are masked.

Shape legend: R rows, L capacity, H query heads, Hkv key heads, G = H / Hkv, D head_dim, K listed blocks of a query
head, E = G K, N splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.triton_decode import (
    ROWS,
    Split,
    add_keys,
    load_queries,
    merge,
    multiprocessors,
    num_splits,
    store_part,
)

TILE = Split(keys=16, warps=4, stages=1, programs=3) if common.INTERPRETED else Split(64, 4, 4, 4)
_AT_ONCE = 32  # entries that a list is compared with in one go


@triton.jit(do_not_specialize=["K", "E"])
def _share_kernel(ids_ptr, block_ptr, heads_ptr, count_ptr, K, E, ENTRIES: tl.constexpr, AT_ONCE: tl.constexpr):
    """Program = (row, key head): each block that a head of the group chose, once, and a bit for each such head."""
    first = tl.program_id(0).to(tl.int64) * E
    e = tl.arange(0, ENTRIES)
    ids = tl.load(ids_ptr + first + e, mask=e < E, other=-1)
    heads = tl.zeros([ENTRIES], tl.int32)
    earlier = tl.zeros([ENTRIES], tl.int32)
    for start in tl.range(0, E, AT_ONCE):
        other = start + tl.arange(0, AT_ONCE)
        same = ids[:, None] == tl.load(ids_ptr + first + other, mask=other < E, other=-2)[None, :]
        heads += tl.sum(tl.where(same, (1 << (other // K))[None, :], 0), 1)
        earlier += tl.sum((same & (other[None, :] < e[:, None])).to(tl.int32), 1)
    new = (ids >= 0) & (earlier == 0)
    place = first + tl.cumsum(new.to(tl.int32), 0) - 1
    tl.store(block_ptr + place, ids, mask=new)
    tl.store(heads_ptr + place, heads, mask=new)
    tl.store(count_ptr + tl.program_id(0), tl.sum(new.to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_kv_heads", "num_splits", "E"])
def _listed_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    last_ptr,
    block_ptr,
    heads_ptr,
    count_ptr,
    part_ptr,
    lse_ptr,
    scale_log2,
    row_stride,
    block_size,
    num_kv_heads,
    num_splits,
    E,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,  # divides block_size
    D: tl.constexpr,
):
    """Program = (key head, split, row): a run of the tiles of the listed blocks, for the G heads of a key head."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    length = (tl.load(last_ptr + row) + 1).to(tl.int32)
    first = row * num_kv_heads + head
    per_block = block_size // KEYS
    tiles = tl.load(count_ptr + first) * per_block
    run = tl.cdiv(tiles, num_splits)
    begin = split * run
    end = tl.minimum(begin + run, tiles)
    g = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    n = tl.arange(0, KEYS)
    q, top, total, out = load_queries(q_ptr, first, G, ROWS, D)
    base = row * row_stride + head * D
    for t in tl.range(begin, end):
        entry = first * E + t // per_block
        at = tl.load(block_ptr + entry) * block_size + (t % per_block) * KEYS + n
        chose = (tl.load(heads_ptr + entry) >> g) & 1
        live = at < length
        where = base + at.to(tl.int64)[:, None] * (num_kv_heads * D) + d[None, :]
        k = tl.load(k_ptr + where, mask=live[:, None], other=0.0)
        v = tl.load(v_ptr + where, mask=live[:, None], other=0.0)
        seen = live[None, :] & (chose != 0)[:, None]
        top, total, out = add_keys(q, k, v, seen, scale_log2, top, total, out)
    store_part(part_ptr, lse_ptr, first * num_splits + split, top, total, out, G, ROWS, D)


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

    Raises:
        ValueError: more than 16 query heads per key head.
    """
    R, H, D = q_RHD.shape
    (L, Hkv), K, device = k_RLHD.shape[1:3], ids_RHK.shape[-1], q_RHD.device
    G = H // Hkv
    if G > ROWS:
        raise ValueError(f"{G} query heads per key head: at most {ROWS}")
    block, heads = (torch.empty((R, Hkv, G * K), dtype=torch.int32, device=device) for _ in range(2))
    count = torch.empty((R, Hkv), dtype=torch.int32, device=device)
    entries = max(16, common.next_power_of_two(G * K))
    _share_kernel[(R * Hkv,)](
        ids_RHK.contiguous(), block, heads, count, K, G * K, ENTRIES=entries, AT_ONCE=_AT_ONCE, num_warps=4
    )
    keys = min(tile.keys, block_size & -block_size)  # the largest power of two that divides the block
    splits = num_splits(R * Hkv, min(L, G * K * block_size), multiprocessors(device), tile)
    part = torch.empty((R, Hkv, splits, G, D), dtype=torch.float32, device=device)
    lse = torch.empty((R, Hkv, splits, G), dtype=torch.float32, device=device)
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    _listed_kernel[(Hkv, splits, R)](
        q_RHD.contiguous(),
        k_RLHD,
        v_RLHD,
        last_R,
        block,
        heads,
        count,
        part,
        lse,
        scale * common.LOG2E,
        k_RLHD.stride(0),
        block_size,
        Hkv,
        splits,
        G * K,
        G=G,
        ROWS=ROWS,
        KEYS=keys,
        D=D,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return merge(part, lse, torch.empty((R, H, D), dtype=q_RHD.dtype, device=device))
