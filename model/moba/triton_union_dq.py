# mypy: disable-error-code="no-untyped-def"
"""Backward of the union path for the queries, in the manner of FlashAttention-2 (Dao 2023, section 3.2).

Query tiles walk the union of the blocks their rows chose, as forward. Rows without the block get lse = infinity,
hence p = 0.

Shape legend: triton_common.py; words and planes: triton_membership.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba import triton_steps as steps
from model.moba.blocks import BlockTable
from model.moba.triton_common import Tile
from model.moba.triton_membership import Membership
from model.moba.triton_sums import RowSums
from model.moba.triton_union import _advance, _enter


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
        blocks, bit, key, end, next_bit, next_start, rest = _enter(
            word, block_start_ptr, group * 32, block_size, ROWS
        )
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


def union_dq(
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
