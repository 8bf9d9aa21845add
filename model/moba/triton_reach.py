# mypy: disable-error-code="no-untyped-def"
"""How far a query sees without gaps: its own block, or, while topk covers all of its past, the whole document.

The first `past + 1` blocks of a document hold queries with at most `past` past blocks. Where those are known to
be all chosen (`BlockTable.complete_past`), such a query sees every key before it, and needs no lists and no
partial results: it runs as if its own block started where its document does.

Shape legend: triton_common.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba.blocks import BlockTable
from model.moba.triton_table import last_at_most

_PIECE = tl.constexpr(512)


@dataclass(frozen=True)
class Reach:
    """start: int32 [T], first key of the run that ends with the query itself; where that run holds all that the
    query sees, the bitwise complement (a negative number). end: int32 [NB], where the queries end that see a
    block's keys that way. many: whether those may be a third of all queries or more, by the number of documents.
    """

    start: Tensor
    end: Tensor
    many: bool = False


@triton.jit(do_not_specialize=["num_docs", "num_tokens", "num_blocks", "block_size", "past", "steps"])
def _reach_kernel(
    cu_ptr, first_block_ptr, own_block_ptr, own_start_ptr, block_start_ptr, block_len_ptr, start_ptr, end_ptr,
    num_docs, num_tokens, num_blocks, block_size, past, steps,
):  # fmt: skip
    i = tl.program_id(0) * _PIECE + tl.arange(0, _PIECE)
    live = i < num_tokens
    first = tl.load(first_block_ptr + i, mask=live, other=0)
    own = tl.load(own_block_ptr + i, mask=live, other=0)
    own_start = tl.load(own_start_ptr + i, mask=live, other=0)
    whole = own - first <= past
    tl.store(start_ptr + i, tl.where(whole, ~tl.load(block_start_ptr + first), own_start), mask=live)

    live = i < num_blocks
    begin = tl.load(block_start_ptr + i, mask=live, other=0)
    end = begin + tl.load(block_len_ptr + i, mask=live, other=0)
    token = tl.minimum(begin, num_tokens - 1)  # ids not in use start at T
    first = tl.load(first_block_ptr + token)
    seen = tl.load(block_start_ptr + first) + (past + 1) * block_size
    seen = tl.minimum(seen, tl.load(cu_ptr + last_at_most(cu_ptr, num_docs, token, steps) + 1))
    tl.store(end_ptr + i, tl.where(i - first <= past, seen, end), mask=live)


@triton.jit
def first_key(start):
    """First key of a run, from `Reach.start`."""
    return start ^ (start >> 31)


def build_reach(table: BlockTable, past: int) -> Reach:
    """The reach of all queries of `table`, where those with at most `past` past blocks choose all of them.

    No host synchronisation.
    """
    num_docs, T, NB = table.cu_seqlens.numel() - 1, table.num_tokens, table.block_start.numel()
    start, end = torch.empty_like(table.own_start), torch.empty_like(table.block_start)
    _reach_kernel[(common.ceil_div(max(T, NB), _PIECE.value),)](
        table.cu_seqlens,
        table.first_block,
        table.own_block,
        table.own_start,
        table.block_start,
        table.block_len,
        start,
        end,
        num_docs,
        T,
        NB,
        table.block_size,
        past,
        num_docs.bit_length() + 1,
        num_warps=4,
    )
    return Reach(start, end, _many(table, past))


def _many(table: BlockTable, past: int) -> bool:
    num_docs = table.cu_seqlens.numel() - 1
    return past > 0 and 3 * num_docs * (past + 1) >= table.block_start.numel()


def seldom(table: BlockTable) -> bool:
    """Whether so few queries choose all of their past that lists for them too are faster: under a third of all.

    Forward and backward at head_dim 64 with 512 x 8, ms without / with lists: half of 8K tokens 2.07 / 2.11, a
    quarter of 16K 4.88 / 4.69, an eighth of 32K 10.20 / 10.12 (one H200). With blocks of 128 nothing is lost at an
    eighth (4.52 / 4.53).
    """
    return table.block_size > 128 and not _many(table, table.complete_past)
