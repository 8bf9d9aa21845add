# mypy: disable-error-code="no-untyped-def"
"""Forward over the chosen past blocks, block by block: one partial result per pair.

A program takes one key block and the queries that chose it (gathered rows), and writes one partial result per
pair: normalised output and lse2. Routed blocks are full blocks of the query's own document before its own block:
no causal or document mask.

Shape legend: triton_common.py. Partials of a chunk: part [heads of the chunk, tokens of the chunk, G, K, D].
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


@triton.jit(do_not_specialize=["num_lists", "first_head", "pair_base", "pairs_per_head"])
def _routed_kernel(
    q_ptr,
    k_desc,
    v_desc,
    part_ptr,
    lse_ptr,
    row_ptr,
    pair_ptr,
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
    EVEN: tl.constexpr,  # block_size % KEYS == 0
):
    """Program = up to ROWS pairs of one block; keys stream through shared memory."""
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
        top = tl.full([ROWS], steps.LOW, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, D], tl.float32)
        column = (first_head + head) * D
        for j in tl.range(0, block_size, KEYS):
            k = k_desc.load([start + j, column])
            v = v_desc.load([start + j, column])
            top, total, out = steps.attend(
                q, k, v, (j + n < block_size)[None, :], scale_log2, top, total, out, not EVEN
            )
        out = out * (1.0 / total)[:, None]
        to = head.to(tl.int64) * pairs_per_head + pair - pair_base
        tl.store(part_ptr + to[:, None] * D + d[None, :], out.to(part_ptr.dtype.element_ty), mask=live[:, None])
        tl.store(lse_ptr + to, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["num_lists", "first_head", "pair_base", "pairs_per_head"])
def _stationary_kernel(
    q_ptr,
    k_desc,
    v_desc,
    part_ptr,
    lse_ptr,
    row_ptr,
    pair_ptr,
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
    """Program = a run of pairs of one small block: its keys stay in shared memory, query rows stream."""
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
            score = tl.dot(q, k.T, input_precision="ieee")
            if not EVEN:
                score = tl.where((n < block_size)[None, :], score, float("-inf"))
            top = tl.max(score, 1) * scale_log2
            p = tl.exp2(score * scale_log2 - top[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee") * (1.0 / total)[:, None]
            to = base + tl.load(pair_ptr + offset + i + r, mask=live, other=0)
            tl.store(
                part_ptr + to[:, None] * D + d[None, :], out.to(part_ptr.dtype.element_ty), mask=live[:, None]
            )
            tl.store(lse_ptr + to, top + tl.log2(total), mask=live)


def routed(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    part: Tensor,
    part_lse: Tensor,
    lists: Lists,
    tiles: TileTable,
    table: BlockTable,
    first_token: int,
    scale_log2: float,
    tile: Tile,
    stationary: bool,
) -> None:
    """Fills part [heads, tokens, G, K, D] and part_lse (base 2) for one chunk; empty slots stay untouched."""
    D = q_THD.shape[-1]
    kernel = _stationary_kernel if stationary else _routed_kernel
    slots = lists.group * lists.slots
    kernel[(tiles.bound,)](
        q_THD,
        common.token_rows(k_THD, tile.keys),
        common.token_rows(v_THD, tile.keys),
        part,
        part_lse,
        lists.row,
        lists.pair,
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
        D=D,
        EVEN=table.block_size % tile.keys == 0,
        **tile.options,
    )
