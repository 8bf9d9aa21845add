# mypy: disable-error-code="no-untyped-def"
"""Backward of the union path, in the manner of FlashAttention-2 (Dao 2023, section 3.2), without atomics.

dq: query tiles walk the union of the blocks their rows chose, as forward. dk, dv: key tiles walk the query units
some row of which chose their block, from the end of the document backwards, all heads of the group, and then the
block's own queries: every sum has one fixed order. Rows without the block get lse = infinity, hence p = 0.

Shape legend: triton_common.py; words, planes and units: triton_membership.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba import triton_steps as steps
from model.moba.blocks import BlockTable
from model.moba.triton_common import Tile
from model.moba.triton_membership import Membership, UnitLists, build_unit_lists
from model.moba.triton_sums import RowSums
from model.moba.triton_union import tiles_for
from model.moba.triton_union_dq import union_dq


@triton.jit(
    do_not_specialize=["padded_sums", "padded_tokens", "H", "planes", "num_blocks", "num_subs", "capacity"]
)
def _union_dkv_kernel(
    q_desc,
    dout_desc,
    k_desc,
    v_desc,
    lse_desc,
    delta_desc,
    word_desc,
    entry_ptr,
    count_ptr,
    block_start_ptr,
    block_len_ptr,
    dk_ptr,
    dv_ptr,
    scale_log2,
    softmax_scale,
    padded_sums,
    padded_tokens,
    H,
    planes,
    num_blocks,
    num_subs,
    capacity,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program = (key head, block, KEYS of its keys). Early blocks, which most queries see, start first."""
    sub = tl.program_id(0) % num_subs
    lists = tl.program_id(0) // num_subs
    kv = lists // num_blocks
    block = lists - kv * num_blocks
    length = tl.load(block_len_ptr + block)
    if sub * KEYS < length:
        start = tl.load(block_start_ptr + block)
        first_key = start + sub * KEYS
        end = start + length
        key = first_key + tl.arange(0, KEYS)
        d = tl.arange(0, D)
        k = k_desc.load([first_key, kv * D])  # keys past the block's end come along; nothing of theirs is stored
        v = v_desc.load([first_key, kv * D])
        dk = tl.zeros([KEYS, D], tl.float32)
        dv = tl.zeros([KEYS, D], tl.float32)
        entries = entry_ptr + lists.to(tl.int64) * capacity
        count = tl.load(count_ptr + lists)
        plane = (block >> 5) % planes
        ahead = tl.load(entries, mask=count > 0, other=0)
        for i in tl.range(0, count, num_stages=STAGES):
            first = ahead // G * ROWS
            head = kv * G + ahead % G
            ahead = tl.load(entries + i + 1, mask=i + 1 < count, other=0)
            q = q_desc.load([first, head * D])
            dout = dout_desc.load([first, head * D])
            word = word_desc.load([(head * planes + plane) * padded_tokens + first])
            lse = lse_desc.load([head * padded_sums + first])
            delta = delta_desc.load([head * padded_sums + first])
            lse = tl.where(((word >> (block & 31)) & 1) != 0, lse, float("inf"))
            dk, dv, _ = steps.key_gradients(q, dout, lse, delta, k, v, True, scale_log2, dk, dv, False)
        dk, dv = steps.own_rows(
            q_desc, dout_desc, lse_desc, delta_desc, k, v, key, first_key, end, kv, padded_sums, scale_log2,
            dk, dv, True, G, ROWS, D, STAGES,
        )  # fmt: skip
        at = (key.to(tl.int64) * (H // G) + kv)[:, None] * D + d[None, :]
        inside = (key < end)[:, None]
        tl.store(dk_ptr + at, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def backward_pass(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    dout_THD: Tensor,
    table: BlockTable,
    softmax_scale: float,
    found: Membership,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k, v."""
    tiles = tiles_for(q_THD.shape[2], table.block_size)
    sums = RowSums(out_THD, dout_THD, lse_TH)
    units = build_unit_lists(found, table, k_THD.shape[1])
    dq, dk, dv = torch.empty_like(q_THD), torch.empty_like(k_THD), torch.empty_like(v_THD)
    union_dq(q_THD, k_THD, v_THD, dout_THD, sums, table, found, dq, softmax_scale, tiles.dq)
    _dkv(q_THD, k_THD, v_THD, dout_THD, sums, table, found, units, dk, dv, softmax_scale, tiles.dkv)
    return dq, dk, dv


def _dkv(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    dout_THD: Tensor,
    sums: RowSums,
    table: BlockTable,
    found: Membership,
    units: UnitLists,
    dk_THD: Tensor,
    dv_THD: Tensor,
    softmax_scale: float,
    tile: Tile,
) -> None:
    H, D = q_THD.shape[1:]
    Hkv, blocks = units.count.shape
    num_subs = common.ceil_div(table.block_size, tile.keys)
    _union_dkv_kernel[(Hkv * blocks * num_subs,)](
        common.token_rows(q_THD, tile.rows),
        common.token_rows(dout_THD, tile.rows),
        common.token_rows(k_THD, tile.keys),
        common.token_rows(v_THD, tile.keys),
        common.vector(sums.lse_HT, tile.rows),
        common.vector(sums.delta_HT, tile.rows),
        common.vector(found.word, tile.rows),
        units.entry,
        units.count,
        table.block_start,
        table.block_len,
        dk_THD,
        dv_THD,
        softmax_scale * common.LOG2E,
        softmax_scale,
        sums.lse_HT.shape[1],
        found.word.shape[2],
        H,
        found.planes,
        blocks,
        num_subs,
        units.entry.shape[2],
        G=H // Hkv,
        ROWS=tile.rows,
        KEYS=tile.keys,
        D=D,
        STAGES=tile.stages,
        **tile.options,
    )
