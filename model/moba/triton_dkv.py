# mypy: disable-error-code="no-untyped-def"
"""Backward for the keys: dk and dv, summed over every query of the key head's group in one fixed order.

A program owns KEYS keys of one block. First the list of the pairs that chose the block (gathered query rows,
lse and delta streamed in list order), then the block's own queries, causally. Scores are computed transposed,
S^T = K Q^T, so that p and ds enter the next product as register operands without a transposition.

For blocks of at most 128 keys the same program also has everything for the partial dq of its pairs: the fused
variant writes it and no dq kernel runs.

Shape legend: triton_common.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba import triton_steps as steps
from model.moba.blocks import BlockTable
from model.moba.triton_common import Tile
from model.moba.triton_lists import Lists
from model.moba.triton_pieces import SUM_KEYS, Pieces, sum_pieces
from model.moba.triton_reach import Reach
from model.moba.triton_sums import RowSums


@triton.jit(
    do_not_specialize=["padded_tokens", "H", "num_kv_heads", "first_head", "num_heads", "num_lists",
                       "pairs_per_head", "num_subs", "max_extra", "segment"]
)  # fmt: skip
def _dkv_kernel(
    q_ptr,
    dout_ptr,
    q_desc,
    dout_desc,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    lse_desc,
    delta_desc,
    list_lse_desc,
    list_delta_desc,
    row_ptr,
    pair_ptr,
    offset_ptr,
    count_ptr,
    extra_ptr,
    num_extra_ptr,
    slot_ptr,
    block_start_ptr,
    block_len_ptr,
    reach_end_ptr,
    part_ptr,
    piece_ptr,
    dk_ptr,
    dv_ptr,
    scale_log2,
    softmax_scale,
    padded_tokens, H, num_kv_heads, first_head, num_heads, num_lists, pairs_per_head, num_subs, block_size,
    max_extra, segment,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    ROUTED: tl.constexpr,
    FUSED: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,  # block_size % KEYS == 0
    POINTERS: tl.constexpr,  # to keys and values, else descriptors
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program = (block, key head, KEYS of its keys): the first `segment` list entries and the own block.

    With SPLIT, programs before those take one further segment of a long list each, and whoever works on a long
    list leaves fp32 pieces for `sum_pieces`. Early blocks, which have the longest lists, start first.
    """
    sub = tl.program_id(0) % num_subs
    number = tl.program_id(0) // num_subs - max_extra
    local = number % num_heads
    block = number // num_heads
    begin = 0
    active = True
    if SPLIT:  # noqa: SIM102 - the outer one is decided by the compiler
        if number < 0:
            extra = number + max_extra
            active = extra < tl.load(num_extra_ptr)
            lists = tl.load(extra_ptr + extra * 2, mask=active, other=0)
            begin = tl.load(extra_ptr + extra * 2 + 1, mask=active, other=0) * segment
            local = lists // num_lists
            block = lists - local * num_lists
    length = tl.load(block_len_ptr + block)
    if active & (sub * KEYS < length):
        block_start = tl.load(block_start_ptr + block)
        first_key = block_start + sub * KEYS
        end = block_start + length
        head = first_head + local
        n = tl.arange(0, KEYS)
        d = tl.arange(0, D)
        r = tl.arange(0, ROWS)
        key = first_key + n
        if POINTERS:
            at_key = (key.to(tl.int64) * num_kv_heads + head)[:, None] * D + d[None, :]
            k = tl.load(k_ptr + at_key, mask=(key < end)[:, None], other=0.0)
            v = tl.load(v_ptr + at_key, mask=(key < end)[:, None], other=0.0)
        else:  # keys past the block's end come along; nothing of theirs is stored
            k = k_desc.load([first_key, head * D])
            v = v_desc.load([first_key, head * D])
        dk = tl.zeros([KEYS, D], tl.float32)
        dv = tl.zeros([KEYS, D], tl.float32)
        if ROUTED:
            offset = tl.load(offset_ptr + local * num_lists + block)
            count = tl.load(count_ptr + local * num_lists + block)
            if SPLIT:
                count = tl.minimum(count, begin + segment)
            rows = row_ptr + offset
            # row ids are fetched one step ahead: the gather of q and dout depends on them
            ahead = tl.load(rows + begin + r, mask=begin + r < count, other=0)
            for i in tl.range(begin, count, ROWS, num_stages=STAGES):
                live = i + r < count
                row = ahead.to(tl.int64)
                ahead = tl.load(rows + i + ROWS + r, mask=i + ROWS + r < count, other=0)
                q = tl.load(q_ptr + row[:, None] * D + d[None, :])
                dout = tl.load(dout_ptr + row[:, None] * D + d[None, :])
                lse = tl.where(live, list_lse_desc.load([offset + i]), float("inf"))
                delta = tl.where(live, list_delta_desc.load([offset + i]), 0.0)  # not NaN: ds = 0 * (.. - delta)
                # a chosen block is full: only dq, which sums over keys, must not see those past its end
                dk, dv, dst = steps.key_gradients(
                    q, dout, lse, delta, k, v, (key < end)[:, None], scale_log2, dk, dv, FUSED & (not EVEN)
                )
                if FUSED:
                    dq = tl.dot(dst.T, k, input_precision="ieee")
                    to = local.to(tl.int64) * pairs_per_head + tl.load(
                        pair_ptr + offset + i + r, mask=live, other=0
                    )
                    to = to[:, None] * D + d[None, :]
                    tl.store(part_ptr + to, dq.to(part_ptr.dtype.element_ty), mask=live[:, None])
        dk, dv = steps.own_rows(
            q_desc, dout_desc, lse_desc, delta_desc, k, v, key, first_key, tl.load(reach_end_ptr + block), head,
            padded_tokens, scale_log2,
            dk, dv, begin == 0, G, ROWS, D, STAGES,
        )  # fmt: skip
        at = (key.to(tl.int64) * num_kv_heads + head)[:, None] * D + d[None, :]
        live_key = (key < end)[:, None]
        whole = True
        if SPLIT:
            whole = tl.load(count_ptr + local * num_lists + block) <= segment  # again: cheaper than keeping it
        if whole:
            tl.store(dk_ptr + at, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=live_key)
            tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=live_key)
        elif SPLIT:
            slot = tl.load(slot_ptr + local * num_lists + block) + begin // segment
            place = (slot.to(tl.int64) * (2 * block_size) + sub * KEYS + n)[:, None] * D + d[None, :]
            inside = (sub * KEYS + n < block_size)[:, None]
            tl.store(piece_ptr + place, dk, mask=inside)
            tl.store(piece_ptr + place + block_size * D, dv, mask=inside)


def dkv(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    dout_THD: Tensor,
    sums: RowSums,
    lists: Lists | None,
    list_lse: Tensor | None,
    list_delta: Tensor | None,
    part: Tensor | None,
    table: BlockTable,
    reach: Reach,
    dk_THD: Tensor,
    dv_THD: Tensor,
    heads: range,
    softmax_scale: float,
    tile: Tile,
    pointers: bool = False,
) -> None:
    """dk, dv [T, Hkv, D] of some key heads. With `part` also the dq partials of all tokens (fused)."""
    H, D = q_THD.shape[1:]
    Hkv = k_THD.shape[1]
    num_subs = common.ceil_div(table.block_size, tile.keys)
    spare = sums.lse_TH  # stands in for arguments that this variant never touches
    cut = None if lists is None else lists.segments()
    pieces = Pieces.of(cut, table.block_size, D, spare)
    _dkv_kernel[((table.block_start.numel() * len(heads) + pieces.max_extra) * num_subs,)](
        q_THD,
        dout_THD,
        common.token_rows(q_THD, tile.rows),
        common.token_rows(dout_THD, tile.rows),
        k_THD,
        v_THD,
        common.token_rows(k_THD, tile.keys),
        common.token_rows(v_THD, tile.keys),
        common.vector(sums.lse_HT, tile.rows),
        common.vector(sums.delta_HT, tile.rows),
        common.vector(spare if list_lse is None else list_lse, tile.rows),
        common.vector(spare if list_delta is None else list_delta, tile.rows),
        spare if lists is None else lists.row,
        spare if lists is None else lists.pair,
        spare if lists is None else lists.offset,
        spare if lists is None else lists.count,
        pieces.extra,
        pieces.num_extra,
        pieces.slot,
        table.block_start,
        table.block_len,
        reach.end,
        spare if part is None else part,
        pieces.piece,
        dk_THD,
        dv_THD,
        softmax_scale * common.LOG2E,
        softmax_scale,
        sums.lse_HT.shape[1],
        H,
        Hkv,
        heads.start,
        len(heads),
        table.block_start.numel() + 1,
        0 if lists is None else lists.pairs_per_head,
        num_subs,
        table.block_size,
        pieces.max_extra,
        pieces.length,
        G=H // Hkv,
        ROWS=tile.rows,
        KEYS=tile.keys,
        D=D,
        ROUTED=lists is not None,
        FUSED=part is not None,
        SPLIT=cut is not None,
        EVEN=table.block_size % tile.keys == 0,
        POINTERS=pointers,
        STAGES=tile.stages,
        **tile.options,
    )
    if lists is not None and cut is not None:
        sum_pieces(pieces.piece, cut, lists, table, dk_THD, dv_THD, softmax_scale, min(SUM_KEYS, tile.keys))
