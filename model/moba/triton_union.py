# mypy: disable-error-code="no-untyped-def"
"""The second exact path: query tiles walk the union of the blocks that their rows chose, under a bit per row.

For dense-ish shapes, where every block is chosen by some row of nearly every tile: no lists of queries, no partial
results, and out is written once. Costs what dense attention costs in these kernels, whatever topk is. Same
arguments and results as the routed path (`triton_op`); `triton_rule` says which one runs.

A row that did not choose a block takes part in its products with a shift of infinity, so that every p = exp2(score
- shift) is 0: the mask costs nothing per element. The own block comes first, so every running maximum is finite.

Shape legend: triton_common.py; words and planes: triton_membership.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba import triton_steps as steps
from model.moba.blocks import BlockTable
from model.moba.triton_common import Tile
from model.moba.triton_membership import Membership, build_membership


@dataclass(frozen=True)
class UnionTiles:
    """The tiles of one (head_dim, block_size)."""

    forward: Tile
    dq: Tile
    dkv: Tile


@cache
def tiles_for(head_dim: int, block_size: int) -> UnionTiles:
    """Tiles after the routed path's winners; tiny ones in the interpreter, so that small inputs have many."""
    keys = min(64, common.next_power_of_two(block_size))
    if common.INTERPRETED:
        small = Tile(rows=16, keys=min(32, keys), warps=4, stages=1)
        return UnionTiles(forward=small, dq=small, dkv=small)
    if head_dim <= 64:
        return UnionTiles(Tile(128, keys, 8, 2, 128), Tile(128, keys, 8, 3, 128), Tile(64, 64, 4, 3))
    return UnionTiles(forward=Tile(128, keys, 8, 2, 128), dq=Tile(128, keys, 8, 3), dkv=Tile(64, 64, 4, 2))


@triton.jit
def _lowest_bit(word):
    """Index of the lowest set bit of an int32 scalar; a negative number if there is none."""
    low = word & -word
    return ((low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit
def _blocks_of(word, ROWS: tl.constexpr):
    """Union of the rows' words: the scalar word, and how many bits it has."""
    b = tl.arange(0, 32)
    union = tl.max((word[:, None] >> b[None, :]) & 1, 0)
    return tl.sum(union << b, 0), tl.sum(union, 0)


@triton.jit
def _start_of(block_start_ptr, base, bit):
    return tl.load(block_start_ptr + base + tl.maximum(bit, 0))


@triton.jit
def _enter(word, block_start_ptr, base, block_size, ROWS: tl.constexpr):
    """How many blocks of a word some row chose, and the state of `_advance` before the first of them."""
    rest, blocks = _blocks_of(word, ROWS)
    bit = _lowest_bit(rest)
    key = _start_of(block_start_ptr, base, bit)
    rest = rest & (rest - 1)
    next_bit = _lowest_bit(rest)
    next_start = _start_of(block_start_ptr, base, next_bit)
    return blocks, bit, key, key + block_size, next_bit, next_start, rest & (rest - 1)


@triton.jit
def _advance(key, end, bit, next_bit, next_start, rest, block_start_ptr, base, block_size, KEYS: tl.constexpr):
    """One step on along the chosen blocks. The start of the block after the current one is always at hand."""
    key += KEYS
    done = key >= end
    key = tl.where(done, next_start, key)
    end = tl.where(done, next_start + block_size, end)
    bit = tl.where(done, next_bit, bit)
    next_bit = tl.where(done, _lowest_bit(rest), next_bit)
    rest = tl.where(done, rest & (rest - 1), rest)
    return key, end, bit, next_bit, _start_of(block_start_ptr, base, next_bit), rest


@triton.jit
def _chosen_step(q, k, v, hit, inside, scale_log2, top, total, out, EVEN: tl.constexpr):
    """One online-softmax step of the rows with `hit`; the others keep what they have."""
    score = tl.dot(q, k.T, input_precision="ieee")
    if not EVEN:
        score = tl.where(inside, score, float("-inf"))
    new_top = tl.where(hit, tl.maximum(top, tl.max(score, 1) * scale_log2), top)
    p = tl.exp2(score * scale_log2 - tl.where(hit, new_top, float("inf"))[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
    return new_top, total, out


@triton.jit(do_not_specialize=["num_tokens", "padded_tokens", "H", "planes", "num_tiles"])
def _union_kernel(
    q_ptr,
    k_desc,
    v_desc,
    word_ptr,
    first_block_ptr,
    own_block_ptr,
    own_start_ptr,
    block_start_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
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
    EVEN: tl.constexpr,  # block_size % KEYS == 0
):
    """Program = (ROWS tokens, query head): own block, then every block that a row of the tile chose.

    Key heads one after the other (their keys stay in the cache), in each the late, long tiles first.
    """
    local = tl.program_id(0) % (num_tiles * G)
    kv = tl.program_id(0) // (num_tiles * G)
    first = (num_tiles - 1 - local // G) * ROWS
    head = kv * G + local % G
    column = kv * D
    token = first + tl.arange(0, ROWS)
    live = token < num_tokens
    d = tl.arange(0, D)
    n = tl.arange(0, KEYS)
    row = token.to(tl.int64) * H + head
    q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
    top = tl.full([ROWS], steps.LOW, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)

    # Rows of one tile may lie in several blocks. One loop and no pipelining: accumulators that two pipelined loops
    # hand over make ptxas wait for every single matrix instruction of the whole kernel.
    last = tl.minimum(first + ROWS, num_tokens) - 1
    depth = token - tl.load(own_start_ptr + token, mask=live, other=0)
    for j in tl.range(tl.load(own_start_ptr + first), last + 1, KEYS, num_stages=1):
        visible = steps.inside_own(token, depth, j + n)
        k = k_desc.load([j, column])
        v = v_desc.load([j, column])
        top, total, out = steps.attend(q, k, v, visible, scale_log2, top, total, out, True)

    per_block = (block_size + KEYS - 1) // KEYS
    for group in tl.range(tl.load(first_block_ptr + first) >> 5, ((tl.load(own_block_ptr + last) - 1) >> 5) + 1):
        at = (head * planes + group % planes).to(tl.int64) * padded_tokens
        word = tl.load(word_ptr + at + token, mask=live, other=0)
        blocks, bit, key, end, next_bit, next_start, rest = _enter(
            word, block_start_ptr, group * 32, block_size, ROWS
        )
        for _ in tl.range(0, blocks * per_block):
            k = k_desc.load([key, column])
            v = v_desc.load([key, column])
            hit = ((word >> bit) & 1) != 0
            top, total, out = _chosen_step(
                q, k, v, hit, (key + n < end)[None, :], scale_log2, top, total, out, EVEN
            )
            key, end, bit, next_bit, next_start, rest = _advance(
                key, end, bit, next_bit, next_start, rest, block_start_ptr, group * 32, block_size, KEYS
            )
    out = out * (1.0 / total)[:, None]
    tl.store(out_ptr + row[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=live[:, None])
    tl.store(lse_ptr + row, top + tl.log2(total), mask=live)


def forward_pass(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, block_ids: Tensor, table: BlockTable, softmax_scale: float
) -> tuple[Tensor, Tensor, Membership]:
    """out [T, H, D], lse2 fp32 [T, H], and who chose what (the backward pass reads it)."""
    T, H, D = q_THD.shape
    Hkv = k_THD.shape[1]
    tiles = tiles_for(D, table.block_size)
    found = build_membership(block_ids, table, tiles.dkv.rows)
    out = torch.empty_like(q_THD)
    lse = torch.empty((T, H), dtype=torch.float32, device=q_THD.device)
    tile = tiles.forward
    num_tiles = common.ceil_div(T, tile.rows)
    _union_kernel[(num_tiles * H,)](
        q_THD,
        common.token_rows(k_THD, tile.keys),
        common.token_rows(v_THD, tile.keys),
        found.word,
        table.first_block,
        table.own_block,
        table.own_start,
        table.block_start,
        out,
        lse,
        softmax_scale * common.LOG2E,
        table.block_size,
        T,
        found.word.shape[2],
        H,
        found.planes,
        num_tiles,
        G=H // Hkv,
        ROWS=tile.rows,
        KEYS=tile.keys,
        D=D,
        EVEN=table.block_size % tile.keys == 0,
        **tile.options,
    )
    return out, lse, found
