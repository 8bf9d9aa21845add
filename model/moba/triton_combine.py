# mypy: disable-error-code="no-untyped-def"
"""Forward of the own block, and the merge with the partial results of the past blocks.

The kernel walks queries: own block first, then the partials in slot order. The sums of a query are thus always
made in the same order, whatever the tiling.

Shape legend: triton_common.py. Partials of a chunk: part [heads of the chunk, tokens of the chunk, G, K, D].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba import triton_steps as steps
from model.moba.triton_common import Tiles
from model.moba.triton_reach import Reach, first_key


@triton.jit(do_not_specialize=["num_tokens", "H", "K", "first_head", "num_heads", "first_token", "pairs_per_head"])
def _combine_kernel(
    q_ptr,
    k_desc,
    v_desc,
    part_ptr,
    part_lse_ptr,
    ids_ptr,
    start_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
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
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program = (ROWS tokens, query head): own block, then the partials in slot order."""
    head, g, first, token, live, row = steps.query_tile(num_tokens, H, first_head, num_heads, first_token, G, ROWS)
    d = tl.arange(0, D)
    n = tl.arange(0, KEYS)
    q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
    top = tl.full([ROWS], steps.LOW, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)

    last = tl.minimum(first + ROWS, num_tokens) - 1
    begin, plain_end = steps.own_range(start_ptr, first, last, KEYS, SPLIT)
    column = head * D
    start = tl.load(start_ptr + token, mask=live, other=0)
    depth = token - first_key(start)
    for j in tl.range(plain_end, last + 1, KEYS, num_stages=1 if SPLIT else STAGES):
        k = k_desc.load([j, column])
        v = v_desc.load([j, column])
        top, total, out = steps.attend(
            q, k, v, steps.inside_own(token, depth, j + n), scale_log2, top, total, out, True
        )
    if SPLIT:
        for far in tl.range(begin, plain_end, steps.FAR):
            for j in tl.range(far, tl.minimum(far + steps.FAR, plain_end), KEYS):
                k = k_desc.load([j, column])
                v = v_desc.load([j, column])
                top, total, out = steps.attend(q, k, v, True, scale_log2, top, total, out, False)

    pair, live_past, bits = steps.past_slots(
        ids_ptr, row, live, start, token, g, head, first_head, first_token, pairs_per_head, K, G, SLOTS
    )
    for s in tl.range(0, K, num_stages=AHEAD):
        used = steps.is_used(bits, ids_ptr, row, live_past, K, s, SLOTS)
        lse = tl.load(part_lse_ptr + pair + s, mask=used, other=float("-inf"))
        part = tl.load(part_ptr + (pair + s)[:, None] * D + d[None, :], mask=used[:, None], other=0.0)
        new_top = tl.maximum(top, lse)
        decay = tl.exp2(top - new_top)
        weight = tl.exp2(lse - new_top)
        out = out * decay[:, None] + part.to(tl.float32) * weight[:, None]
        total = total * decay + weight
        top = new_top
    out = out * (1.0 / total)[:, None]
    tl.store(out_ptr + row[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=live[:, None])
    tl.store(lse_ptr + row, top + tl.log2(total), mask=live)


def combine(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    part: Tensor | None,
    part_lse: Tensor | None,
    block_ids: Tensor,
    reach: Reach,
    out_THD: Tensor,
    lse_TH: Tensor,
    heads: range,
    tokens: range,
    scale_log2: float,
    tiles: Tiles,
) -> None:
    """Own block plus partials -> out [T, H, D] and lse2 fp32 [T, H], for some key heads and tokens."""
    H, D = q_THD.shape[1:]
    G = H // k_THD.shape[1]
    K = block_ids.shape[-1]
    tile = tiles.combine
    grid = (common.ceil_div(len(tokens), tile.rows) * len(heads) * G,)
    _combine_kernel[grid](
        q_THD,
        common.token_rows(k_THD, tile.keys),
        common.token_rows(v_THD, tile.keys),
        q_THD if part is None else part,
        lse_TH if part_lse is None else part_lse,
        block_ids,
        reach.start,
        out_THD,
        lse_TH,
        scale_log2,
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
        SPLIT=tiles.combine_split,
        STAGES=tile.stages,
        **tile.options,
    )
