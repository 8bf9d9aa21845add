# mypy: disable-error-code="no-untyped-def"
"""Backward for the queries over the chosen past blocks: partial dq of every pair.

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
from model.moba.triton_cuts import TileTable
from model.moba.triton_lists import Lists
from model.moba.triton_sums import RowSums


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
