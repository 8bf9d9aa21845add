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
from model.moba.triton_backward import RowSums
from model.moba.triton_common import Tile
from model.moba.triton_membership import Membership, UnitLists, build_unit_lists
from model.moba.triton_union import _advance, _blocks_of, _lowest_bit, _start_of, tiles_for


@triton.jit(do_not_specialize=["num_tokens", "padded_tokens", "H", "planes", "num_tiles"])
def _union_dq_kernel(
    q_ptr,
    dout_ptr,
    k_desc,
    v_desc,
    lse_ptr,
    delta_ptr,
    word_ptr,
    first_block_ptr,
    own_block_ptr,
    own_start_ptr,
    block_start_ptr,
    dq_ptr,
    scale_log2,
    softmax_scale,
    block_size,
    num_tokens,
    padded_tokens,
    H,
    planes,
    num_tiles,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program = (ROWS tokens, query head); the order of programs and blocks is that of the forward kernel."""
    local = tl.program_id(0) % (num_tiles * G)
    kv = tl.program_id(0) // (num_tiles * G)
    first = (num_tiles - 1 - local // G) * ROWS
    head = kv * G + local % G
    column = kv * D
    token = first + tl.arange(0, ROWS)
    live = token < num_tokens
    n = tl.arange(0, KEYS)
    row = token.to(tl.int64) * H + head
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + at, mask=live[:, None], other=0.0)
    dout = tl.load(dout_ptr + at, mask=live[:, None], other=0.0)
    lse = tl.load(lse_ptr + row, mask=live, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=live, other=0.0)
    dq = tl.zeros([ROWS, D], tl.float32)

    # one loop, not pipelined: as in the forward kernel
    last = tl.minimum(first + ROWS, num_tokens) - 1
    depth = token - tl.load(own_start_ptr + token, mask=live, other=0)
    for j in tl.range(tl.load(own_start_ptr + first), last + 1, KEYS, num_stages=1):
        visible = steps.inside_own(token, depth, j + n)
        k = k_desc.load([j, column])
        v = v_desc.load([j, column])
        ds = steps.query_gradient(q, dout, k, v, lse, delta, visible, scale_log2, True)
        dq = tl.dot(ds, k, dq, input_precision="ieee")

    per_block = (block_size + KEYS - 1) // KEYS
    for group in tl.range(tl.load(first_block_ptr + first) >> 5, ((tl.load(own_block_ptr + last) - 1) >> 5) + 1):
        place = (head * planes + group % planes).to(tl.int64) * padded_tokens
        word = tl.load(word_ptr + place + token, mask=live, other=0)
        rest, blocks = _blocks_of(word, ROWS)
        bit = _lowest_bit(rest)
        key = _start_of(block_start_ptr, group * 32, bit)
        end = key + block_size
        rest = rest & (rest - 1)
        next_bit = _lowest_bit(rest)
        next_start = _start_of(block_start_ptr, group * 32, next_bit)
        rest = rest & (rest - 1)
        for _ in tl.range(0, blocks * per_block):
            k = k_desc.load([key, column])
            v = v_desc.load([key, column])
            shift = tl.where(((word >> bit) & 1) != 0, lse, float("inf"))
            inside = (key + n < end)[None, :]
            ds = steps.query_gradient(q, dout, k, v, shift, delta, inside, scale_log2, not EVEN)
            dq = tl.dot(ds, k, dq, input_precision="ieee")
            key, end, bit, next_bit, next_start, rest = _advance(
                key, end, bit, next_bit, next_start, rest, block_start_ptr, group * 32, block_size, KEYS
            )
    tl.store(dq_ptr + at, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=live[:, None])


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
        r = tl.arange(0, ROWS)
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
        # Own block: tiles of tokens from first_key on, start rounded down for aligned 1-D loads of lse, delta;
        # tokens before first_key see none of these keys.
        own = first_key // 4 * 4
        num = (end - own + (ROWS - 1)) // ROWS
        for i in tl.range(0, num * G, num_stages=STAGES):
            head = kv * G + i % G
            first = own + i // G * ROWS
            token = first + r
            q = q_desc.load([first, head * D])
            dout = dout_desc.load([first, head * D])
            lse = lse_desc.load([head * padded_sums + first])
            delta = delta_desc.load([head * padded_sums + first])
            visible = key[:, None] <= tl.where(token < end, token, -1)[None, :]
            dk, dv, _ = steps.key_gradients(q, dout, lse, delta, k, v, visible, scale_log2, dk, dv, True)
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
    _dq(q_THD, k_THD, v_THD, dout_THD, sums, table, found, dq, softmax_scale, tiles.dq)
    _dkv(q_THD, k_THD, v_THD, dout_THD, sums, table, found, units, dk, dv, softmax_scale, tiles.dkv)
    return dq, dk, dv


def _dq(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    dout_THD: Tensor,
    sums: RowSums,
    table: BlockTable,
    found: Membership,
    dq_THD: Tensor,
    softmax_scale: float,
    tile: Tile,
) -> None:
    T, H, D = q_THD.shape
    num_tiles = common.ceil_div(T, tile.rows)
    _union_dq_kernel[(num_tiles * H,)](
        q_THD,
        dout_THD,
        common.token_rows(k_THD, tile.keys),
        common.token_rows(v_THD, tile.keys),
        sums.lse_TH,
        sums.delta_TH,
        found.word,
        table.first_block,
        table.own_block,
        table.own_start,
        table.block_start,
        dq_THD,
        softmax_scale * common.LOG2E,
        softmax_scale,
        table.block_size,
        T,
        found.word.shape[2],
        H,
        found.planes,
        num_tiles,
        G=H // k_THD.shape[1],
        ROWS=tile.rows,
        KEYS=tile.keys,
        D=D,
        EVEN=table.block_size % tile.keys == 0,
        **tile.options,
    )


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
