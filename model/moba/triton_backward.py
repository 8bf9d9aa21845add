# mypy: disable-error-code="no-untyped-def"
"""Backward for the queries: row sums `delta`, partial dq of every pair, and dq = own block + partials.

Every part of the softmax is differentiated with the final output and log-sum-exp (FlashAttention-2, Dao 2023,
section 3.2): p = exp2(score * scale_log2 - lse2), ds = p * (do . v - delta), delta = do . out.

Shape legend: triton_common.py. Tp = T rounded up so that a head's row of lse_HT starts 16-byte aligned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba import triton_steps as steps
from model.moba.blocks import BlockTable
from model.moba.triton_common import Tile, Tiles
from model.moba.triton_lists import Lists, TileTable

_DELTA_ROWS = 64


@triton.jit(do_not_specialize=["num_tokens", "padded_tokens", "H"])
def _delta_kernel(
    out_ptr, dout_ptr, lse_ptr, delta_ptr, lse_t_ptr, delta_t_ptr, num_tokens, padded_tokens, H,
    ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Program = (ROWS tokens, query head). Tokens T .. Tp - 1 of the transposed outputs get zeros."""
    head = tl.program_id(0) % H
    token = tl.program_id(0) // H * ROWS + tl.arange(0, ROWS)
    live = token < num_tokens
    row = token.to(tl.int64) * H + head
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    out = tl.load(out_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    lse = tl.load(lse_ptr + row, mask=live, other=0.0)
    tl.store(delta_ptr + row, delta, mask=live)
    turned = head.to(tl.int64) * padded_tokens + token
    tl.store(lse_t_ptr + turned, lse)
    tl.store(delta_t_ptr + turned, delta)


@triton.jit(do_not_specialize=["num_lists", "first_head", "pair_base", "pairs_per_head"])
def _dq_kernel(
    q_ptr,
    dout_ptr,
    k_desc,
    v_desc,
    lse_ptr,
    delta_ptr,
    part_ptr,
    row_ptr,
    pair_ptr,
    list_lse_ptr,
    list_delta_ptr,
    tile_ptr,
    num_tiles_ptr,
    block_start_ptr,
    scale_log2,
    block_size,
    num_lists,
    first_head,
    pair_base,
    pairs_per_head,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program = up to ROWS pairs of one block: partial dq (without the softmax scale), one row per pair.

    Also copies lse and delta into list order, which the dk, dv kernel streams.
    """
    lists, offset, count, active = steps.list_tile(tile_ptr, num_tiles_ptr)
    if active:
        head, start = steps.list_block(block_start_ptr, lists, num_lists)
        r = tl.arange(0, ROWS)
        d = tl.arange(0, D)
        n = tl.arange(0, KEYS)
        live = r < count
        row = tl.load(row_ptr + offset + tl.minimum(r, count - 1)).to(tl.int64)
        pair = tl.load(pair_ptr + offset + r, mask=live, other=0)  # needed last, in flight from here
        q = tl.load(q_ptr + row[:, None] * D + d[None, :])
        dout = tl.load(dout_ptr + row[:, None] * D + d[None, :])
        lse = tl.load(lse_ptr + row)
        delta = tl.load(delta_ptr + row)
        tl.store(list_lse_ptr + offset + r, lse, mask=live)
        tl.store(list_delta_ptr + offset + r, delta, mask=live)
        dq = tl.zeros([ROWS, D], tl.float32)
        column = (first_head + head) * D
        for j in tl.range(0, block_size, KEYS):
            k = k_desc.load([start + j, column])
            v = v_desc.load([start + j, column])
            inside = (j + n < block_size)[None, :]
            ds = steps.query_gradient(q, dout, k, v, lse, delta, inside, scale_log2, not EVEN)
            dq = tl.dot(ds, k, dq, input_precision="ieee")
        to = head.to(tl.int64) * pairs_per_head + pair - pair_base
        tl.store(part_ptr + to[:, None] * D + d[None, :], dq.to(part_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["num_lists", "first_head", "pair_base", "pairs_per_head"])
def _stationary_dq_kernel(
    q_ptr,
    dout_ptr,
    k_desc,
    v_desc,
    lse_ptr,
    delta_ptr,
    part_ptr,
    row_ptr,
    pair_ptr,
    list_lse_ptr,
    list_delta_ptr,
    tile_ptr,
    num_tiles_ptr,
    block_start_ptr,
    scale_log2,
    block_size,
    num_lists,
    first_head,
    pair_base,
    pairs_per_head,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,  # block_size == KEYS
):
    """As `_dq_kernel` for a small block: its keys stay in shared memory, rows stream."""
    lists, offset, count, active = steps.list_tile(tile_ptr, num_tiles_ptr)
    if active:
        head, start = steps.list_block(block_start_ptr, lists, num_lists)
        r = tl.arange(0, ROWS)
        d = tl.arange(0, D)
        n = tl.arange(0, KEYS)
        k = k_desc.load([start, (first_head + head) * D])
        v = v_desc.load([start, (first_head + head) * D])
        base = head.to(tl.int64) * pairs_per_head - pair_base
        for i in tl.range(0, count, ROWS):
            live = i + r < count
            row = tl.load(row_ptr + offset + tl.minimum(i + r, count - 1)).to(tl.int64)
            q = tl.load(q_ptr + row[:, None] * D + d[None, :])
            dout = tl.load(dout_ptr + row[:, None] * D + d[None, :])
            lse = tl.load(lse_ptr + row)
            delta = tl.load(delta_ptr + row)
            tl.store(list_lse_ptr + offset + i + r, lse, mask=live)
            tl.store(list_delta_ptr + offset + i + r, delta, mask=live)
            inside = (n < block_size)[None, :]
            ds = steps.query_gradient(q, dout, k, v, lse, delta, inside, scale_log2, not EVEN)
            dq = tl.dot(ds, k, input_precision="ieee")
            to = base + tl.load(pair_ptr + offset + i + r, mask=live, other=0)
            tl.store(part_ptr + to[:, None] * D + d[None, :], dq.to(part_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["num_tokens", "H", "K", "first_head", "num_heads", "first_token", "pairs_per_head"])
def _merge_kernel(
    q_ptr,
    dout_ptr,
    k_desc,
    v_desc,
    lse_ptr,
    delta_ptr,
    part_ptr,
    ids_ptr,
    own_start_ptr,
    dq_ptr,
    scale_log2,
    softmax_scale,
    num_tokens,
    H,
    K,
    first_head,
    num_heads,
    first_token,
    pairs_per_head,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    SLOTS: tl.constexpr,  # see triton_common.slot_bits
    AHEAD: tl.constexpr,  # stages of the loop over partials
):
    """Program = (ROWS tokens, query head): dq of the own block plus the partials in slot order."""
    local = tl.program_id(0) % (num_heads * G)
    first = first_token + tl.program_id(0) // (num_heads * G) * ROWS
    head = first_head + local // G
    g = local % G
    token = first + tl.arange(0, ROWS)
    live = token < num_tokens
    d = tl.arange(0, D)
    n = tl.arange(0, KEYS)
    row = token.to(tl.int64) * H + head * G + g
    at = row[:, None] * D + d[None, :]
    q = tl.load(q_ptr + at, mask=live[:, None], other=0.0)
    dout = tl.load(dout_ptr + at, mask=live[:, None], other=0.0)
    lse = tl.load(lse_ptr + row, mask=live, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=live, other=0.0)
    depth = token - tl.load(own_start_ptr + token, mask=live, other=0)
    last = tl.minimum(first + ROWS, num_tokens) - 1
    dq = tl.zeros([ROWS, D], tl.float32)
    for j in tl.range(tl.load(own_start_ptr + first), last + 1, KEYS):
        k = k_desc.load([j, head * D])
        v = v_desc.load([j, head * D])
        visible = steps.inside_own(token, depth, j + n)
        ds = steps.query_gradient(q, dout, k, v, lse, delta, visible, scale_log2, True)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    pair = (head - first_head).to(tl.int64) * pairs_per_head + ((token - first_token).to(tl.int64) * G + g) * K
    bits = live.to(tl.int32)
    if SLOTS > 0:
        bits = steps.used_slots(ids_ptr, row, live, K, SLOTS)
    for s in tl.range(0, K, num_stages=AHEAD):
        used = steps.is_used(bits, ids_ptr, row, live, K, s, SLOTS)
        part = tl.load(part_ptr + (pair + s)[:, None] * D + d[None, :], mask=used[:, None], other=0.0)
        dq += part.to(tl.float32)
    tl.store(dq_ptr + at, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=live[:, None])


class RowSums:
    """lse2 and delta = do . out of every row, fp32: [T, H] for gathers, [H, Tp] for runs of tokens."""

    def __init__(self, out_THD: Tensor, dout_THD: Tensor, lse_TH: Tensor):
        T, H, D = out_THD.shape
        padded = common.ceil_div(T, _DELTA_ROWS) * _DELTA_ROWS
        self.lse_TH = lse_TH
        self.delta_TH = torch.empty_like(lse_TH)
        self.lse_HT = torch.empty((H, padded), dtype=torch.float32, device=lse_TH.device)
        self.delta_HT = torch.empty((H, padded), dtype=torch.float32, device=lse_TH.device)
        _delta_kernel[(padded // _DELTA_ROWS * H,)](
            out_THD,
            dout_THD,
            lse_TH,
            self.delta_TH,
            self.lse_HT,
            self.delta_HT,
            T,
            padded,
            H,
            ROWS=_DELTA_ROWS,
            D=D,
            num_warps=4,
        )


def dq_partials(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    dout_THD: Tensor,
    sums: RowSums,
    part: Tensor,
    list_lse: Tensor,
    list_delta: Tensor,
    lists: Lists,
    tiles: TileTable,
    table: BlockTable,
    first_token: int,
    scale_log2: float,
    tile: Tile,
    stationary: bool,
) -> None:
    """Fills part [heads, tokens, G, K, D] for one chunk, and its share of list_lse, list_delta [entries]."""
    slots = lists.group * lists.slots
    kernel = _stationary_dq_kernel if stationary else _dq_kernel
    kernel[(tiles.bound,)](
        q_THD,
        dout_THD,
        common.token_rows(k_THD, tile.keys),
        common.token_rows(v_THD, tile.keys),
        sums.lse_TH,
        sums.delta_TH,
        part,
        lists.row,
        lists.pair,
        list_lse,
        list_delta,
        tiles.tile,
        tiles.num_tiles,
        table.block_start,
        scale_log2,
        table.block_size,
        lists.num_lists,
        lists.first_head,
        first_token * slots,
        part.shape[1] * slots,
        ROWS=tile.rows,
        KEYS=tile.keys,
        D=q_THD.shape[-1],
        EVEN=table.block_size % tile.keys == 0,
        **tile.options,
    )


def merge_dq(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    dout_THD: Tensor,
    sums: RowSums,
    part: Tensor | None,
    block_ids: Tensor,
    table: BlockTable,
    dq_THD: Tensor,
    heads: range,
    tokens: range,
    softmax_scale: float,
    tiles: Tiles,
) -> None:
    """dq [T, H, D] of some key heads and tokens: own block plus partials."""
    H, D = q_THD.shape[1:]
    G = H // k_THD.shape[1]
    K = block_ids.shape[-1]
    tile = tiles.merge
    grid = (common.ceil_div(len(tokens), tile.rows) * len(heads) * G,)
    _merge_kernel[grid](
        q_THD,
        dout_THD,
        common.token_rows(k_THD, tile.keys),
        common.token_rows(v_THD, tile.keys),
        sums.lse_TH,
        sums.delta_TH,
        q_THD if part is None else part,
        block_ids,
        table.own_start,
        dq_THD,
        softmax_scale * common.LOG2E,
        softmax_scale,
        tokens.stop,
        H,
        K,
        heads.start,
        len(heads),
        tokens.start,
        len(tokens) * G * K,
        G=G,
        ROWS=tile.rows,
        KEYS=tile.keys,
        D=D,
        SLOTS=common.slot_bits(K),
        AHEAD=tiles.ahead,
        **tile.options,
    )
