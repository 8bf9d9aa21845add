# mypy: disable-error-code="no-untyped-def"
"""Steps that several kernels take: softmax and gradient steps, what a program reads first, own-block masks.

Scores are in the base-2 domain; rows that must not take part get lse2 = infinity, hence p = 0.

Shape legend: triton_common.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.moba.triton_reach import first_key

# Maximum of a row that has seen nothing yet: finite, so that exp2(-inf - top) is 0 and never inf - inf.
LOW = tl.constexpr(-1.0e30)
# Where two loops hand accumulators on, ptxas waits for every single matrix instruction of both (its note C7515),
# unless the second lies in an outer loop, which steps so far that it runs once.
FAR = tl.constexpr(1 << 20)


@triton.jit
def attend(q, k, v, visible, scale_log2, top, total, out, MASK: tl.constexpr):
    """One online-softmax step: top (running maximum), total, out after the keys k, v."""
    score = tl.dot(q, k.T, input_precision="ieee")
    if MASK:
        score = tl.where(visible, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1) * scale_log2)
    p = tl.exp2(score * scale_log2 - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
    return new_top, total, out


@triton.jit
def query_gradient(q, dout, k, v, lse, delta, visible, scale_log2, MASK: tl.constexpr):
    """ds [ROWS, KEYS] in k's dtype: what times k adds to dq (without the softmax scale)."""
    p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale_log2 - lse[:, None])
    if MASK:
        p = tl.where(visible, p, 0.0)
    ds = p * (tl.dot(dout, v.T, input_precision="ieee") - delta[:, None])
    return ds.to(k.dtype)


@triton.jit
def key_gradients(q, dout, lse, delta, k, v, visible, scale_log2, dk, dv, MASK: tl.constexpr):
    """Adds the rows q, dout [ROWS, D] to dk, dv [KEYS, D]; returns ds^T too."""
    pt = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale_log2 - lse[None, :])
    if MASK:
        pt = tl.where(visible, pt, 0.0)
    dv = tl.dot(pt.to(dout.dtype), dout, dv, input_precision="ieee")
    dst = (pt * (tl.dot(v, dout.T, input_precision="ieee") - delta[None, :])).to(q.dtype)
    dk = tl.dot(dst, q, dk, input_precision="ieee")
    return dk, dv, dst


@triton.jit
def own_rows(
    q_desc, dout_desc, lse_desc, delta_desc, k, v, key, first_key, end, kv_head, padded_tokens, scale_log2, dk, dv,
    active, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the queries up to `end` that see the keys without a list, all heads of the group, to dk, dv [KEYS, D].

    Tiles of tokens from first_key on, their start rounded down for aligned 1-D loads of lse and delta; tokens
    before first_key see none of these keys.
    """
    start = first_key // 4 * 4
    num = (end - start + (ROWS - 1)) // ROWS
    if not active:
        num = 0
    for i in tl.range(0, num * G, num_stages=STAGES):
        head = kv_head * G + i % G
        first = start + i // G * ROWS
        token = first + tl.arange(0, ROWS)
        q = q_desc.load([first, head * D])
        dout = dout_desc.load([first, head * D])
        lse = lse_desc.load([head * padded_tokens + first])
        delta = delta_desc.load([head * padded_tokens + first])
        visible = key[:, None] <= tl.where(token < end, token, -1)[None, :]
        dk, dv, _ = key_gradients(q, dout, lse, delta, k, v, visible, scale_log2, dk, dv, True)
    return dk, dv


@triton.jit
def list_tile(tile_ptr, num_tiles_ptr):
    """This program's tile (see TileTable): list, first entry, number of entries, and whether there is one.

    Read before the test: one latency less for the tiles in use; the others get arbitrary numbers.
    """
    tile = tl.program_id(0)
    lists = tl.load(tile_ptr + tile * 4)
    offset = tl.load(tile_ptr + tile * 4 + 1)
    count = tl.load(tile_ptr + tile * 4 + 2)
    return lists, offset, count, tile < tl.load(num_tiles_ptr)


@triton.jit
def list_block(block_start_ptr, lists, num_lists):
    """Key head (from the first of this pass) and first key of a list's block."""
    head = lists // num_lists
    return head, tl.load(block_start_ptr + lists - head * num_lists)


@triton.jit
def query_tile(num_tokens, H, first_head, num_heads, first_token, G: tl.constexpr, ROWS: tl.constexpr):
    """This program's ROWS tokens of one query head: key head, place in its group, first and all tokens, rows."""
    local = tl.program_id(0) % (num_heads * G)
    first = first_token + tl.program_id(0) // (num_heads * G) * ROWS
    head = first_head + local // G
    g = local % G
    token = first + tl.arange(0, ROWS)
    return head, g, first, token, token < num_tokens, token.to(tl.int64) * H + head * G + g


@triton.jit
def own_range(start_ptr, first, last, KEYS: tl.constexpr, SPLIT: tl.constexpr):
    """First key that tokens first .. last see without a list; with SPLIT also where the keys end that all see.

    Tokens of one tile may lie in several blocks; then no keys count as seen by all.
    """
    begin = first_key(tl.load(start_ptr + first))
    plain_end = begin
    if SPLIT:  # noqa: SIM102 - the outer one is decided by the compiler
        if first_key(tl.load(start_ptr + last)) == begin:
            plain_end = begin + ((first - begin) // KEYS) * KEYS
    return begin, plain_end


@triton.jit
def past_slots(
    ids_ptr, row, live, start, token, g, head, first_head, first_token, pairs_per_head, K,
    G: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Number of each row's first pair among the partials; which rows have pairs; bits of the slots in use."""
    pair = (head - first_head).to(tl.int64) * pairs_per_head + ((token - first_token).to(tl.int64) * G + g) * K
    live_past = live & (start >= 0)
    bits = live.to(tl.int32)
    if SLOTS > 0:
        bits = used_slots(ids_ptr, row, live_past, K, SLOTS)
    return pair, live_past, bits


@triton.jit
def inside_own(token, depth, key):
    """own_start <= key <= token in one unsigned comparison; depth = token - own_start."""
    return (token[:, None] - key[None, :]).to(tl.uint32) <= depth.to(tl.uint32)[:, None]


@triton.jit
def used_slots(ids_ptr, row, live, K, SLOTS: tl.constexpr):
    """Bit s of a row: slot s holds a block. Read at once: the loop over partials then loads nothing else."""
    s = tl.arange(0, SLOTS)[None, :]
    ids = tl.load(ids_ptr + row[:, None] * K + s, mask=live[:, None] & (s < K), other=-1)
    return tl.sum(tl.where(ids >= 0, 1 << s, 0), 1)


@triton.jit
def is_used(bits, ids_ptr, row, live, K, s, SLOTS: tl.constexpr):
    """Whether slot s of the rows holds a block; SLOTS == 0: more slots than bits, asked one by one."""
    if SLOTS > 0:
        return ((bits >> s) & 1) != 0
    else:
        return tl.load(ids_ptr + row * K + s, mask=live, other=-1) >= 0
