# mypy: disable-error-code="no-untyped-def"
"""The gate: the K best past blocks of every query and head, without a score table in memory.

Scores stream through registers one tile of 64 blocks at a time and meet a running list of the K best. Each
fp32 score gives its low 6 bits to the column number, so that one maximum finds value and place; scores are
thus compared to 18 significant bits (Lu et al. 2025, arXiv:2502.13189, section 2.2 defines the choice).

With many blocks `gluon_gate` finds the same blocks in half the time.

Ties go to the lowest block id. Among positive packed scores of a tile the lower column is the larger number;
among negative ones it is the smaller, so an equal score with a lower id may replace a listed one.

Shape legend: triton_common.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import hopper
from model.moba import triton_common as common
from model.moba.blocks import BlockTable
from model.moba.triton_pool import block_means

NOTHING = tl.constexpr(-2.0e38)  # what an empty place in the list of the best holds
MASKED = tl.constexpr(-3.0e38)  # score of a block that may not be chosen


@triton.jit
def insert(score, first, best, ids, worst, worst_id, column, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Puts the scores [ROWS, COLS] of blocks first.. into the lists best, ids [ROWS, slots].

    `worst` is the lowest value of a row's list and `worst_id` the highest id that has it: the one to evict.
    """
    lowest: tl.constexpr = -2147483647
    minus_inf: tl.constexpr = float("-inf")
    key = (score.to(tl.int32, bitcast=True) & (-COLS)) | ((COLS - 1) - column)[None, :]
    even, odd = tl.split(tl.reshape(key.to(tl.float32, bitcast=True), [ROWS, COLS // 2, 2]))
    upper = tl.maximum(even, odd)
    lower = tl.minimum(even, odd, propagate_nan=tl.PropagateNan.ALL)  # a NaN, never chosen, doubles no neighbour
    top = tl.max(upper, 1)
    bits = top.to(tl.int32, bitcast=True)
    value = (bits & (-COLS)).to(tl.float32, bitcast=True)
    more = tl.max((value > worst).to(tl.int32), 0)
    while more > 0:
        block = first + (COLS - 1) - (bits & (COLS - 1))
        better = (value > worst) | ((value == worst) & (block < worst_id))
        evict = (ids == worst_id[:, None]) & better[:, None]
        best = tl.where(evict, value[:, None], best)
        ids = tl.where(evict, block[:, None], ids)
        worst = tl.min(best, 1)
        worst_id = tl.max(tl.where(best == worst[:, None], ids, lowest), 1)
        taken = upper == top[:, None]
        upper = tl.where(taken, lower, upper)
        lower = tl.where(taken, minus_inf, lower)
        top = tl.max(upper, 1)
        bits = top.to(tl.int32, bitcast=True)
        value = (bits & (-COLS)).to(tl.float32, bitcast=True)
        next_block = first + (COLS - 1) - (bits & (COLS - 1))
        again = (value > worst) | ((value == worst) & (next_block < worst_id))
        more = tl.max(again.to(tl.int32), 0)
    return best, ids, worst, worst_id


@triton.jit
def score_of(q, high_desc, low_desc, row, LOW: tl.constexpr):
    score = tl.dot(q, high_desc.load([row, 0]).T, input_precision="ieee")
    if LOW:
        score = tl.dot(q, low_desc.load([row, 0]).T, score)
    return score


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "num_kv_heads", "num_tiles", "K"])
def _gate_kernel(
    q_ptr,
    high_desc,
    low_desc,
    own_block_ptr,
    first_block_ptr,
    ids_ptr,
    num_tokens,
    num_blocks,
    num_kv_heads,
    num_tiles,
    K,
    G: tl.constexpr,
    GROUP: tl.constexpr,  # G rounded up to a power of two
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
    SLOTS: tl.constexpr,  # K rounded up to a power of two
    D: tl.constexpr,
    LOW: tl.constexpr,
):
    """Program = (TOKENS tokens x G query heads of one key head). Late tiles, which see most, start first."""
    ROWS: tl.constexpr = TOKENS * GROUP
    head = tl.program_id(0) % num_kv_heads
    tile = num_tiles - 1 - tl.program_id(0) // num_kv_heads
    r = tl.arange(0, ROWS)
    token = tile * TOKENS + r // GROUP
    g = r % GROUP
    live = (token < num_tokens) & (g < G)
    d = tl.arange(0, D)
    column = tl.arange(0, COLS)
    slot = tl.arange(0, SLOTS)
    row = token.to(tl.int64) * (num_kv_heads * G) + head * G + g
    q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=live[:, None], other=0.0)

    # Block ids grow with the token, so the first and the last token bound what the tile may see.
    last_token = tl.minimum(tile * TOKENS + TOKENS, num_tokens) - 1
    begin = tl.load(first_block_ptr + tile * TOKENS)
    begin_last = tl.load(first_block_ptr + last_token)
    own_first = tl.load(own_block_ptr + tile * TOKENS)
    end = tl.load(own_block_ptr + last_token)
    # where every row chooses all of its past there is nothing to compare
    covered = (begin == begin_last) & (end - begin <= K)
    if covered:
        end = begin
        own_first = begin
    # tiles of blocks that every row may see need no mask; a tile across documents has none
    plain_end = begin
    if begin == begin_last:
        plain_end = begin + ((own_first - begin) // COLS) * COLS

    best = tl.where(slot[None, :] < K, NOTHING, float("inf")) + tl.zeros([ROWS, SLOTS], tl.float32)
    ids = (-1 - slot)[None, :] + tl.zeros([ROWS, SLOTS], tl.int32)
    worst = tl.full([ROWS], NOTHING, tl.float32)
    worst_id = tl.full([ROWS], -1, tl.int32)
    base = head * num_blocks
    for j in tl.range(begin, plain_end, COLS, num_stages=1):
        score = score_of(q, high_desc, low_desc, base + j, LOW)
        best, ids, worst, worst_id = insert(score, j, best, ids, worst, worst_id, column, ROWS, COLS)
    if plain_end < end:
        own = tl.load(own_block_ptr + token, mask=live, other=0)
        first = tl.load(first_block_ptr + token, mask=live, other=0)
        for j in tl.range(plain_end, end, COLS, num_stages=1):
            score = score_of(q, high_desc, low_desc, base + j, LOW)
            block = (j + column)[None, :]
            score = tl.where((block >= first[:, None]) & (block < own[:, None]), score, MASKED)
            best, ids, worst, worst_id = insert(score, j, best, ids, worst, worst_id, column, ROWS, COLS)
    if covered:
        past = tl.load(own_block_ptr + token, mask=live, other=0) - begin
        ids = tl.where(slot[None, :] < past[:, None], begin + slot[None, :], ids)
    out = ids_ptr + row[:, None] * K + slot[None, :]
    tl.store(out, tl.maximum(ids, -1), mask=live[:, None] & (slot < K)[None, :])


@torch.no_grad()
def choose(q_THD: Tensor, k_THD: Tensor, table: BlockTable, num_past: int) -> Tensor:
    """The best `num_past` past blocks of every query and head, int32 [T, H, num_past], -1 = none.

    Args:
        q_THD: [T, H, D]. k_THD: [T, Hkv, D]. Same dtype.
    """
    T, H, D = q_THD.shape
    Hkv = k_THD.shape[1]
    G = H // Hkv
    NB = table.block_start.numel()
    if num_past == 0 or table.max_past == 0:
        return torch.full((T, H, num_past), -1, dtype=torch.int32, device=q_THD.device)
    q_THD, k_THD = q_THD.contiguous(), k_THD.contiguous()
    tile = common.tiles_for(D, table.block_size, NB).gate
    high, low = block_means(k_THD, table)
    if low is not None and tile.keys == 64 and hopper.gate_refusal(D, NB, num_past) is None:
        from model.moba import gluon_gate

        return gluon_gate.choose(q_THD, (high, low), table, num_past)
    group = common.next_power_of_two(G)
    tokens = max(1, tile.rows // group)
    num_tiles = common.ceil_div(T, tokens)
    ids = torch.empty((T, H, num_past), dtype=torch.int32, device=q_THD.device)
    _gate_kernel[(num_tiles * Hkv,)](
        q_THD,
        common.flat_rows(high, tile.keys),
        common.flat_rows(high if low is None else low, tile.keys),
        table.own_block,
        table.first_block,
        ids,
        T,
        NB,
        Hkv,
        num_tiles,
        num_past,
        G=G,
        GROUP=group,
        TOKENS=tokens,
        COLS=tile.keys,
        SLOTS=max(4, common.next_power_of_two(num_past)),
        D=D,
        LOW=low is not None,
        **tile.options,
    )
    return ids
