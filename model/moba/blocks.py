"""How packed documents are cut into key blocks.

Shape legend: T tokens, N documents, NB = T // block_size + N (static bound on the number of blocks),
NF = T // block_size (static bound on the number of full blocks).

Blocks are anchored at document starts and numbered globally: documents in order, each document's blocks in
order, ceil(length / block_size) of them. Every table has a size known from shapes alone, so building one
never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockTable:
    """Block geometry of one packed row of tokens. All tensors are int32 on the device of `cu_seqlens`.

    Attributes:
        block_size: tokens per block.
        num_tokens: T.
        cu_seqlens: [N + 1] document borders.
        own_block: [T] global id of the token's own block.
        first_block: [T] global id of the first block of the token's document. The past blocks of token t
            are `first_block[t] <= j < own_block[t]`; every one of them is full.
        own_start: [T] index of the first token of the token's own block.
        block_start: [NB] index of the block's first token; T for ids not in use.
        block_len: [NB] tokens in the block, 1..block_size; 0 for ids not in use.
        full_id: [NF] ids of the blocks that have block_size tokens, ascending; -1 beyond them.
            Only these can ever be chosen.
        full_rank: [NB] place of a block in `full_id`; -1 for the others.
        complete_past: queries with at most so many past blocks choose all of them; 0: nothing is known.
    """

    block_size: int
    num_tokens: int
    cu_seqlens: Tensor
    own_block: Tensor
    first_block: Tensor
    own_start: Tensor
    block_start: Tensor
    block_len: Tensor
    full_id: Tensor
    full_rank: Tensor
    complete_past: int = 0

    @property
    def max_past(self) -> int:
        """Past blocks a query can have at most, from shapes alone."""
        return max(self.num_tokens - 1, 0) // self.block_size


def build_block_table(cu_seqlens: Tensor, num_tokens: int, block_size: int) -> BlockTable:
    """Tables for documents `cu_seqlens` (int32 [N + 1], from 0 to num_tokens). No host synchronisation."""
    if cu_seqlens.is_cuda:  # some forty small operations would cost as much as the attention of a short row
        from model.moba import triton_table

        return triton_table.build(cu_seqlens, num_tokens, block_size)
    device, size, num_docs = cu_seqlens.device, block_size, cu_seqlens.numel() - 1
    start, end = cu_seqlens[:-1], cu_seqlens[1:].contiguous()
    first = torch.zeros_like(cu_seqlens)  # id of each document's first block; last entry: number of blocks
    first[1:] = torch.cumsum((end - start + (size - 1)) // size, 0, dtype=torch.int32)

    token = torch.arange(num_tokens, dtype=torch.int32, device=device)
    doc = torch.searchsorted(end, token, right=True).clamp_(max=num_docs - 1)
    inner = (token - start[doc]) // size
    own_block = first[doc] + inner
    own_start = start[doc] + inner * size

    ids = torch.arange(num_tokens // size + num_docs, dtype=torch.int32, device=device)
    doc_of = torch.searchsorted(first[1:].contiguous(), ids, right=True).clamp_(max=num_docs - 1)
    used = ids < first[-1]
    begin = start[doc_of] + (ids - first[doc_of]) * size
    block_start = torch.where(used, begin, num_tokens).int()
    block_len = torch.where(used, torch.clamp(end[doc_of] - begin, max=size), 0).int()

    full = block_len == size
    num_full = num_tokens // size
    rank = torch.where(full, torch.cumsum(full, 0) - 1, num_full)  # the others share one slot, cut off below
    full_id = ids.new_full((num_full + 1,), -1).scatter_(0, rank, ids)[:num_full]
    return BlockTable(
        block_size=size,
        num_tokens=num_tokens,
        cu_seqlens=cu_seqlens,
        own_block=own_block,
        first_block=first[doc],
        own_start=own_start,
        block_start=block_start,
        block_len=block_len,
        full_id=full_id,
        full_rank=torch.where(full, rank, -1).int(),
    )


def full_block_rows(table: BlockTable, first: int, last: int) -> Tensor:
    """Token indices of the full blocks of rank first..last-1, int64 [last - first, block_size].

    Ranks not in use give the rows of some other tokens: real memory, values nobody may use.
    """
    ids = table.full_id[first:last].long().clamp(min=0)
    start = torch.clamp(table.block_start[ids].long(), max=table.num_tokens - table.block_size)
    return start[:, None] + torch.arange(table.block_size, device=start.device)
