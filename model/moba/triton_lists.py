"""From "query -> chosen blocks" to "block -> queries that chose it", deterministic and without the host.

A stable sort (`triton_invert`, `triton_sort`) orders all pairs by (key head, block); pairs of one block keep
the order of their tokens, which fixes the order of every sum in the backward pass. Two arrays follow: the row id
and the pair number of every list entry. Lists start at multiples of 4 entries (1-D TMA loads need 16 bytes). All
sizes are bounds from shapes alone, so nothing waits for the device and a CUDA graph can capture it all.

Shape legend: triton_common.py. List l = head * (NB + 1) + block; the last list of a head takes the empty
slots (-1) and is never read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.moba import triton_common as common
from model.moba import triton_cuts, triton_invert, triton_ranges, triton_sort
from model.moba.triton_cuts import Cuts, Segments, TileTable

_UNCUT = Cuts()
# Up to so many pairs at a time the counting sort is faster: 0.06 ms against 0.10 at 2 million, 0.36 against 0.30
# at 7 million (one H200). Both give the same lists.
COUNTED = 1 << 22


@dataclass(frozen=True)
class Lists:
    """Per (key head, block) the pairs that chose it, for key heads first_head .. first_head + num_heads - 1.

    row, pair: int32 [entries]. index: int32, offset and length of every list and how it is cut, in one piece.
    """

    row: Tensor
    pair: Tensor
    index: Tensor
    cuts: Cuts
    num_tokens: int
    num_query_heads: int  # H of the whole layer: row ids are token * H + head
    group: int
    slots: int
    first_head: int
    num_heads: int
    num_lists: int  # NB + 1, per key head

    @property
    def pairs_per_head(self) -> int:
        return self.num_tokens * self.group * self.slots

    @property
    def offset(self) -> Tensor:
        """int32 [num_heads * (NB + 1)], where each list starts."""
        return self._pieces["offset"]

    @property
    def count(self) -> Tensor:
        """int32 [num_heads * (NB + 1)], the length of each list."""
        return self._pieces["count"]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.row, self.pair, self.index

    def without_tensors(self) -> Lists:
        """The numbers only; the tensors go through autograd's own storage."""
        nothing = self.row.new_empty(0)
        return self.with_tensors(nothing, nothing, nothing)

    def with_tensors(self, row: Tensor, pair: Tensor, index: Tensor) -> Lists:
        return dataclasses.replace(self, row=row, pair=pair, index=index)

    @cached_property
    def _pieces(self) -> dict[str, Tensor]:
        total = self.num_lists * self.num_heads
        return _split(self.index, self.cuts.sizes(total, self.pairs_per_head * self.num_heads))

    def segments(self) -> Segments | None:
        """Where long lists are cut; None where none can be long. Depends on shapes only, hence on no budget."""
        if not self.cuts.segment:
            return None
        found, most = self._pieces, self.cuts.max_extra(self.pairs_per_head * self.num_heads)
        return Segments(self.cuts.segment, found["extra"], found["num_extra"], found["slot"], most, 2 * most)

    def tiles(self, rows: int, first_token: int, end_token: int) -> TileTable:
        """Tile table of the list parts whose tokens lie in first_token .. end_token - 1."""
        found = self._pieces
        total, whole = found["count"].numel(), (first_token, end_token) == (0, self.num_tokens)
        pairs = (end_token - first_token) * self.group * self.slots * self.num_heads
        if whole and rows == self.cuts.rows:
            return TileTable(found["tile"], found["num"], Cuts.bound(rows, total, pairs))
        if whole and rows == self.cuts.rows_dq:
            return TileTable(found["tile_dq"], found["num_dq"], Cuts.bound(rows, total, pairs))
        cuts = Cuts(rows=rows)
        part = _pieces_for(cuts.sizes(total, pairs), self.index.device)
        triton_ranges.select(self.row, found, part, first_token * self.num_query_heads,
                           end_token * self.num_query_heads, self.pairs_per_head)  # fmt: skip
        triton_cuts.place(None, cuts, self.num_lists, part)
        triton_cuts.fill(cuts, part)
        return TileTable(part["tile"], part["num"], Cuts.bound(rows, total, pairs))


def build_lists(
    block_ids: Tensor,
    start: Tensor,
    num_blocks: int,
    group: int,
    first_head: int,
    num_heads: int,
    cuts: Cuts = _UNCUT,
) -> Lists:
    """Inverts `block_ids` for some key heads.

    Args:
        block_ids: int32 [T, H, K] contiguous, -1 = empty. start: `Reach.start`, says which queries need no list.
        num_blocks: NB. group: query heads per key head. first_head, num_heads: the key heads.
        cuts: the tiles and segments to prepare; tiles of other rows or of some tokens are made when asked for.
    """
    T, H, K = block_ids.shape
    device = block_ids.device
    per_head, num_lists = T * group * K, num_blocks + 1
    n, total = per_head * num_heads, num_lists * num_heads
    entries = n + common.LIST_ALIGN * total
    if entries >= 2**31:
        raise ValueError(f"{n} pairs in one list build: positions are int32; build fewer key heads at a time")
    sizes = cuts.sizes(total, n)
    index = torch.empty(_padded(sizes), dtype=torch.int32, device=device)
    found = _split(index, sizes)
    row = torch.empty((entries,), dtype=torch.int32, device=device)
    pair = torch.empty((entries,), dtype=torch.int32, device=device)
    if n <= COUNTED:
        walk = triton_invert.count(block_ids, start, group, first_head, num_heads, num_lists)
        triton_cuts.place(walk.total, cuts, num_lists, found)
        triton_invert.write(walk, block_ids, found["offset"], row, pair)
    else:
        ordered = triton_sort.sort(block_ids, start, group, first_head, num_heads, num_lists)
        triton_cuts.place(ordered.total, cuts, num_lists, found)
        triton_sort.write(ordered, block_ids, found["offset"], row, pair)
    triton_cuts.fill(cuts, found)
    return Lists(row, pair, index, cuts, T, H, group, K, first_head, num_heads, num_lists)


def _padded(sizes: dict[str, int]) -> int:
    return sum(common.ceil_div(size, 4) * 4 for size in sizes.values())


def _split(index: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Pieces of one allocation; each starts at 16 bytes, as kernels that take these pointers were compiled for."""
    padded = [common.ceil_div(size, 4) * 4 for size in sizes.values()]
    pieces = zip(sizes.items(), index.split(padded), strict=True)
    return {name: piece[:size] for (name, size), piece in pieces}


def _pieces_for(sizes: dict[str, int], device: torch.device) -> dict[str, Tensor]:
    return _split(torch.empty(_padded(sizes), dtype=torch.int32, device=device), sizes)
