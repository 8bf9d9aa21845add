# mypy: disable-error-code="no-untyped-def"
"""From "query -> chosen blocks" to "block -> queries that chose it", deterministic and without the host.

One stable sort of the keys (key head, block) orders all pairs; pairs of one block keep the order of their
tokens, which fixes the order of every sum in the backward pass. Two arrays follow: the row id and the pair
number of every list entry. Lists start at multiples of 4 entries (1-D TMA loads need 16 bytes). All sizes
are bounds from shapes alone, so nothing waits for the device and a CUDA graph can capture it all.

Shape legend: triton_common.py. List l = head * (NB + 1) + block; the last list of a head takes the empty
slots (-1) and is never read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba import triton_cuts as cuts

_PIECE = tl.constexpr(1024)  # entries per program of the elementwise kernels


@triton.jit(do_not_specialize=["n", "K", "H", "first_head", "num_lists", "pairs_per_head", "shift"])
def _key_kernel(ids_ptr, key_ptr, n, K, H, first_head, num_lists, pairs_per_head, shift, G: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * _PIECE + tl.arange(0, _PIECE)
    head = i // pairs_per_head
    pair = i - head * pairs_per_head
    token = pair // (G * K)
    inner = pair - token * (G * K)
    source = token * (H * K) + (first_head + head) * (G * K) + inner
    block = tl.load(ids_ptr + source, mask=i < n, other=-1)
    block = tl.where(block < 0, num_lists - 1, block)
    tl.store(key_ptr + i, (head * num_lists + block - shift).to(key_ptr.dtype.element_ty), mask=i < n)


@triton.jit(do_not_specialize=["n", "num_starts", "steps", "shift"])
def _start_kernel(key_ptr, start_ptr, n, num_starts, steps, shift, PIECE: tl.constexpr):
    """start[l] = number of sorted keys below l, by binary search."""
    lists = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    low = tl.zeros([PIECE], tl.int32)
    high = tl.zeros([PIECE], tl.int32) + n
    for _ in tl.range(0, steps):
        middle = (low + high) // 2
        key = tl.load(key_ptr + middle, mask=low < high, other=0).to(tl.int32) + shift
        below = (key < lists) & (low < high)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below | (low >= high), high, middle)
    tl.store(start_ptr + lists, low, mask=lists < num_starts)


@triton.jit(do_not_specialize=["total_lists", "num_lists"])
def _place_kernel(start_ptr, offset_ptr, count_ptr, total_lists, num_lists, ALIGN: tl.constexpr):
    """One program: aligned offset and length of every list."""
    done = tl.zeros([], tl.int32)
    for base in tl.range(0, total_lists, cuts.SCAN):
        i = base + tl.arange(0, cuts.SCAN)
        real = (i < total_lists) & (i % num_lists != num_lists - 1)
        start = tl.load(start_ptr + i, mask=real, other=0)
        count = tl.load(start_ptr + i + 1, mask=real, other=0) - start
        padded = (count + (ALIGN - 1)) // ALIGN * ALIGN
        offset = done + tl.cumsum(padded, 0) - padded
        done += tl.sum(padded, 0)
        tl.store(offset_ptr + i, offset, mask=i < total_lists)
        tl.store(count_ptr + i, count, mask=i < total_lists)


@triton.jit(do_not_specialize=["n", "K", "H", "first_head", "num_lists", "pairs_per_head", "shift"])
def _write_kernel(
    key_ptr,
    order_ptr,
    start_ptr,
    offset_ptr,
    row_ptr,
    pair_ptr,
    n,
    K,
    H,
    first_head,
    num_lists,
    pairs_per_head,
    shift,
    G: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * _PIECE + tl.arange(0, _PIECE)
    live = i < n
    lists = tl.load(key_ptr + i, mask=live, other=0).to(tl.int32) + shift
    head = lists // num_lists
    live = live & (lists - head * num_lists != num_lists - 1)
    source = tl.load(order_ptr + i, mask=live, other=0)
    pair = (source - head.to(tl.int64) * pairs_per_head).to(tl.int32)
    row = pair // K  # token * G + g
    token = row // G
    place = tl.load(offset_ptr + lists, mask=live, other=0) - tl.load(start_ptr + lists, mask=live, other=0) + i
    tl.store(pair_ptr + place, pair, mask=live)
    tl.store(row_ptr + place, token * H + (first_head + head) * G + (row - token * G), mask=live)


@dataclass(frozen=True)
class Lists:
    """Per (key head, block) the pairs that chose it, for key heads first_head .. first_head + num_heads - 1.

    row, pair: int32 [entries]; offset, count: int32 [num_heads * (NB + 1)].
    """

    row: Tensor
    pair: Tensor
    offset: Tensor
    count: Tensor
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
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.row, self.pair, self.offset, self.count

    def without_tensors(self) -> Lists:
        """The numbers only; the tensors go through autograd's own storage."""
        nothing = self.row.new_empty(0)
        return self.with_tensors(nothing, nothing, nothing, nothing)

    def with_tensors(self, row: Tensor, pair: Tensor, offset: Tensor, count: Tensor) -> Lists:
        return dataclasses.replace(self, row=row, pair=pair, offset=offset, count=count)

    def segments(self, block_size: int) -> cuts.Segments | None:
        """Where long lists are cut; None where none can be long. Depends on shapes only, hence on no budget."""
        length = cuts.segment_length(self.group, self.slots, block_size)
        if self.num_tokens * self.group <= length:
            return None
        total, device = self.count.numel(), self.count.device
        max_extra = self.pairs_per_head * self.num_heads // length
        slot = torch.empty(total, dtype=torch.int32, device=device)
        first = torch.empty(total + 1, dtype=torch.int32, device=device)
        cuts.segment_scan_kernel[(1,)](self.count, slot, first, total, length, num_warps=8)
        extra = torch.empty((max_extra, 2), dtype=torch.int32, device=device)
        cuts.segment_kernel[(total,)](self.count, first, extra, length, num_warps=1)
        return cuts.Segments(length, extra, first[total:], slot, max_extra, 2 * max_extra)

    def tiles(self, rows: int, first_token: int, end_token: int) -> cuts.TileTable:
        """Tile table of the list parts whose tokens lie in first_token .. end_token - 1."""
        total = self.offset.numel()
        offset, count = self.offset, self.count
        device = offset.device
        if (first_token, end_token) != (0, self.num_tokens):
            offset, count = torch.empty_like(offset), torch.empty_like(count)
            cuts.range_kernel[(common.ceil_div(total, 128),)](
                self.row,
                self.offset,
                self.count,
                offset,
                count,
                total,
                first_token * self.num_query_heads,
                end_token * self.num_query_heads,
                (self.pairs_per_head + 1).bit_length() + 1,
                PIECE=128,
                num_warps=4,
            )
        first = torch.empty(total + 1, dtype=torch.int32, device=device)
        cuts.tile_scan_kernel[(1,)](count, first, total, ROWS=rows, num_warps=8)
        pairs = (end_token - first_token) * self.group * self.slots * self.num_heads
        bound = pairs // rows + min(total, pairs)
        tile = torch.empty((bound, 4), dtype=torch.int32, device=device)
        cuts.tile_kernel[(total,)](offset, count, first, tile, ROWS=rows, PIECE=128, num_warps=1)
        return cuts.TileTable(tile, first[total:], bound)


def build_lists(block_ids: Tensor, num_blocks: int, group: int, first_head: int, num_heads: int) -> Lists:
    """Inverts `block_ids` for some key heads.

    Args:
        block_ids: int32 [T, H, K] contiguous, -1 = empty.
        num_blocks: NB. group: query heads per key head. first_head, num_heads: the key heads.
    """
    T, H, K = block_ids.shape
    device = block_ids.device
    per_head, num_lists = T * group * K, num_blocks + 1
    n, total = per_head * num_heads, num_lists * num_heads
    if n + common.LIST_ALIGN * total >= 2**31:
        raise ValueError(f"{n} pairs in one list build: positions are int32; build fewer key heads at a time")
    # 16-bit keys sort 1.7 times faster; they are signed, so the first list becomes -2^15
    small = total <= 1 << 16
    shift = 1 << 15 if small else 0
    key = torch.empty(n, dtype=torch.int16 if small else torch.int32, device=device)
    grid = (common.ceil_div(n, _PIECE.value),)
    _key_kernel[grid](block_ids, key, n, K, H, first_head, num_lists, per_head, shift, G=group, num_warps=4)
    key, order = torch.sort(key, stable=True)
    start = torch.empty(total + 1, dtype=torch.int32, device=device)
    _start_kernel[(common.ceil_div(total + 1, 128),)](
        key, start, n, total + 1, n.bit_length() + 1, shift, PIECE=128, num_warps=4
    )
    offset, count = torch.empty_like(start[:-1]), torch.empty_like(start[:-1])
    _place_kernel[(1,)](start, offset, count, total, num_lists, ALIGN=common.LIST_ALIGN, num_warps=8)
    entries = n + common.LIST_ALIGN * total
    row = torch.empty((entries,), dtype=torch.int32, device=device)
    pair = torch.empty((entries,), dtype=torch.int32, device=device)
    _write_kernel[grid](
        key, order, start, offset, row, pair, n, K, H, first_head, num_lists, per_head, shift, G=group, num_warps=4
    )
    return Lists(row, pair, offset, count, T, H, group, K, first_head, num_heads, num_lists)
