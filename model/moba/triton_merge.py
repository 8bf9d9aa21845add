# mypy: disable-error-code="no-untyped-def"
"""Backward for the queries over the own block, and the sum with the partial dq of the past blocks, in slot order.

Shape legend: triton_common.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba import triton_steps as steps
from model.moba.triton_common import Tiles
from model.moba.triton_reach import Reach, first_key
from model.moba.triton_sums import RowSums


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
    start_ptr,
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
    SPLIT: tl.constexpr,  # keys that all rows see have a loop of their own, without a mask
    STAGES: tl.constexpr,
):
    """Program = (ROWS tokens, query head): dq of the own block plus the partials in slot order."""
    head, g, first, token, live, row = steps.query_tile(num_tokens, H, first_head, num_heads, first_token, G, ROWS)
    d = tl.arange(0, D)
    n = tl.arange(0, KEYS)
    at = row[:, None] * D + d[None, :]
    q = tl.load(q_ptr + at, mask=live[:, None], other=0.0)
    dout = tl.load(dout_ptr + at, mask=live[:, None], other=0.0)
    lse = tl.load(lse_ptr + row, mask=live, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=live, other=0.0)
    start = tl.load(start_ptr + token, mask=live, other=0)
    depth = token - first_key(start)
    last = tl.minimum(first + ROWS, num_tokens) - 1
    dq = tl.zeros([ROWS, D], tl.float32)
    begin, plain_end = steps.own_range(start_ptr, first, last, KEYS, SPLIT)
    for j in tl.range(plain_end, last + 1, KEYS, num_stages=1 if SPLIT else STAGES):
        k = k_desc.load([j, head * D])
        v = v_desc.load([j, head * D])
        visible = steps.inside_own(token, depth, j + n)
        ds = steps.query_gradient(q, dout, k, v, lse, delta, visible, scale_log2, True)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    if SPLIT:
        for far in tl.range(begin, plain_end, steps.FAR):
            for j in tl.range(far, tl.minimum(far + steps.FAR, plain_end), KEYS):
                k = k_desc.load([j, head * D])
                v = v_desc.load([j, head * D])
                ds = steps.query_gradient(q, dout, k, v, lse, delta, True, scale_log2, False)
                dq = tl.dot(ds, k, dq, input_precision="ieee")
    pair, live_past, bits = steps.past_slots(
        ids_ptr, row, live, start, token, g, head, first_head, first_token, pairs_per_head, K, G, SLOTS
    )
    for s in tl.range(0, K, num_stages=AHEAD):
        used = steps.is_used(bits, ids_ptr, row, live_past, K, s, SLOTS)
        part = tl.load(part_ptr + (pair + s)[:, None] * D + d[None, :], mask=used[:, None], other=0.0)
        dq += part.to(tl.float32)
    tl.store(dq_ptr + at, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=live[:, None])


def merge_dq(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    dout_THD: Tensor,
    sums: RowSums,
    part: Tensor | None,
    block_ids: Tensor,
    reach: Reach,
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
        reach.start,
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
        SPLIT=tiles.merge_split,
        STAGES=tile.stages,
        **tile.options,
    )
