# mypy: disable-error-code="no-untyped-def"
"""Which query chose which block, as bits: what the union kernels read in place of lists of queries.

Bit `j % 32` of word `(j // 32) % planes` of a row says whether the row chose block j (global id). The words wrap
around after `planes`; there are enough of them that no two blocks chosen by rows of one query tile share a bit,
even where the tile holds the end of one document and the start of others.

Shape legend: triton_common.py. P planes, Tp = T rounded up to whole tiles, U = Tp / unit query units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba.blocks import BlockTable
from model.moba.triton_rule import UNION_MAX_PAST

MAX_ROWS = 128  # tokens in the largest query tile
_CHUNK = 128
_MAX_INDEX = 2**31 - 2**24  # TMA coordinates are int32


@triton.jit(do_not_specialize=["num_tokens", "padded_tokens", "num_units", "H", "K", "planes"])
def _words_kernel(
    ids_ptr, word_ptr, unit_word_ptr, num_tokens, padded_tokens, num_units, H, K, planes, UNIT: tl.constexpr
):  # fmt: skip
    """Program = (UNIT tokens, query head): the words of its rows, and their union."""
    head = tl.program_id(0) % H
    unit = tl.program_id(0) // H
    token = unit * UNIT + tl.arange(0, UNIT)
    live = token < num_tokens
    b = tl.arange(0, 32)
    row = (token.to(tl.int64) * H + head) * K
    for plane in tl.range(0, planes):
        word = tl.zeros([UNIT], tl.int32)
        for s in tl.range(0, K):
            block = tl.load(ids_ptr + row + s, mask=live, other=-1)
            mine = (block >= 0) & ((block >> 5) % planes == plane)
            word |= tl.where(mine, 1 << (block & 31), 0)
        at = (head * planes + plane).to(tl.int64)
        tl.store(word_ptr + at * padded_tokens + token, word)
        union = tl.max((word[:, None] >> b[None, :]) & 1, 0)
        tl.store(unit_word_ptr + at * num_units + unit, tl.sum(union << b, 0))


@triton.jit(do_not_specialize=["num_blocks", "num_units", "capacity", "block_size", "planes"])
def _units_kernel(
    unit_word_ptr,
    block_start_ptr,
    block_len_ptr,
    block_end_ptr,
    entry_ptr,
    count_ptr,
    num_blocks,
    num_units,
    capacity,
    block_size,
    planes,
    G: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program = (key head, block): the (unit, head of the group) pairs some row of which chose the block."""
    block = tl.program_id(0) % num_blocks
    kv = tl.program_id(0) // num_blocks
    count = tl.zeros([], tl.int32)
    begin = tl.load(block_start_ptr + block) + block_size
    end = tl.load(block_end_ptr + block)
    if (tl.load(block_len_ptr + block) == block_size) & (begin < end):
        last = (end - 1) // UNIT
        num = (last - begin // UNIT + 1) * G
        to = entry_ptr + tl.program_id(0).to(tl.int64) * capacity
        for base in tl.range(0, num, CHUNK):
            c = base + tl.arange(0, CHUNK)
            unit = last - c // G
            g = c % G
            plane = ((kv * G + g) * planes + (block >> 5) % planes).to(tl.int64)
            word = tl.load(unit_word_ptr + plane * num_units + unit, mask=c < num, other=0)
            hit = (word >> (block & 31)) & 1
            tl.store(to + count + tl.cumsum(hit, 0) - hit, unit * G + g, mask=hit == 1)
            count += tl.sum(hit, 0)
    tl.store(count_ptr + tl.program_id(0), count)


@dataclass(frozen=True)
class Membership:
    """`word` int32 [H, P, Tp] as described above; `unit_word` int32 [H, P, U], the union over each query unit."""

    word: Tensor
    unit_word: Tensor
    unit: int

    @property
    def planes(self) -> int:
        return self.word.shape[1]


@dataclass(frozen=True)
class UnitLists:
    """Per (key head, block) the query units to visit, from the end of the document backwards.

    `entry` int32 [Hkv, NB, U * G], values unit * G + head of the group; `count` int32 [Hkv, NB]. All programs of a
    key head start with the same queries, which are then read from the cache.
    """

    entry: Tensor
    count: Tensor


def refusal(table: BlockTable, num_heads: int) -> str | None:
    """Why the union kernels cannot take this shape, or None if they can."""
    if table.max_past > UNION_MAX_PAST:
        return f"{table.max_past} past blocks, more than {UNION_MAX_PAST}"
    if num_heads * _planes(table) * _padded(table.num_tokens) > _MAX_INDEX:
        return f"{table.num_tokens} tokens and {num_heads} heads: more words than int32 positions"
    return None


def build_membership(block_ids: Tensor, table: BlockTable, unit: int) -> Membership:
    """Words for block_ids int32 [T, H, K]; a unit is `unit` tokens. No host synchronisation.

    Raises:
        ValueError: a shape that `refusal` names.
    """
    T, H, K = block_ids.shape
    reason = refusal(table, H)
    if reason is not None:
        raise ValueError(f"union attention: {reason}")
    planes, padded = _planes(table), _padded(T)
    word = torch.empty((H, planes, padded), dtype=torch.int32, device=block_ids.device)
    unit_word = torch.empty((H, planes, padded // unit), dtype=torch.int32, device=block_ids.device)
    _words_kernel[(H * (padded // unit),)](
        block_ids, word, unit_word, T, padded, padded // unit, H, K, planes, UNIT=unit, num_warps=2
    )
    return Membership(word, unit_word, unit)


def build_unit_lists(found: Membership, table: BlockTable, num_kv_heads: int) -> UnitLists:
    """For each key block the query units that need it. No host synchronisation."""
    H, planes, units = found.unit_word.shape
    group, blocks = H // num_kv_heads, table.block_start.numel()
    # the last document that starts at or before the block: empty documents share their start with the next one
    document = torch.searchsorted(table.cu_seqlens, table.block_start, right=True, out_int32=True)
    block_end = table.cu_seqlens[document.clamp_(max=table.cu_seqlens.numel() - 1)]
    device = found.word.device
    entry = torch.empty((num_kv_heads, blocks, units * group), dtype=torch.int32, device=device)
    count = torch.empty((num_kv_heads, blocks), dtype=torch.int32, device=device)
    _units_kernel[(num_kv_heads * blocks,)](
        found.unit_word,
        table.block_start,
        table.block_len,
        block_end,
        entry,
        count,
        blocks,
        units,
        units * group,
        table.block_size,
        planes,
        G=group,
        UNIT=found.unit,
        CHUNK=_CHUNK,
        num_warps=4,
    )
    return UnitLists(entry, count)


def _planes(table: BlockTable) -> int:
    if table.cu_seqlens.numel() == 2:
        return max(1, common.ceil_div(table.max_past, 32))
    span = table.max_past + MAX_ROWS  # blocks between the first and the last that rows of one tile can choose
    return (span + 30) // 32 + 1


def _padded(num_tokens: int) -> int:
    return common.ceil_div(num_tokens, MAX_ROWS) * MAX_ROWS
