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

_PIECE = tl.constexpr(1024)  # entries per program of the elementwise kernels
_SCAN = tl.constexpr(4096)  # lists per step of the one-program scans


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
    for base in tl.range(0, total_lists, _SCAN):
        i = base + tl.arange(0, _SCAN)
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


@triton.jit(do_not_specialize=["total_lists", "first_row", "end_row", "steps"])
def _range_kernel(
    row_ptr, offset_ptr, count_ptr, out_offset_ptr, out_count_ptr, total_lists, first_row, end_row, steps,
    PIECE: tl.constexpr,
):  # fmt: skip
    """The part of every list with first_row <= row id < end_row. Row ids of a list ascend by token."""
    lists = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    live = lists < total_lists
    offset = tl.load(offset_ptr + lists, mask=live, other=0)
    count = tl.load(count_ptr + lists, mask=live, other=0)
    begin = _lower_bound(row_ptr, offset, count, first_row, steps)
    end = _lower_bound(row_ptr, offset, count, end_row, steps)
    tl.store(out_offset_ptr + lists, begin, mask=live)
    tl.store(out_count_ptr + lists, end - begin, mask=live)


@triton.jit
def _lower_bound(row_ptr, offset, count, value, steps):
    low = offset
    high = offset + count
    for _ in tl.range(0, steps):
        middle = (low + high) // 2
        below = (tl.load(row_ptr + middle, mask=low < high, other=0) < value) & (low < high)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below | (low >= high), high, middle)
    return low


@triton.jit(do_not_specialize=["total_lists"])
def _tile_scan_kernel(count_ptr, first_tile_ptr, total_lists, ROWS: tl.constexpr):
    """One program: first tile of every list; the entry after the last list is the number of tiles."""
    done = tl.zeros([], tl.int32)
    for base in tl.range(0, total_lists, _SCAN):
        i = base + tl.arange(0, _SCAN)
        count = tl.load(count_ptr + i, mask=i < total_lists, other=0)
        tiles = (count + (ROWS - 1)) // ROWS
        first = done + tl.cumsum(tiles, 0) - tiles
        done += tl.sum(tiles, 0)
        tl.store(first_tile_ptr + i, first, mask=i < total_lists)
    tl.store(first_tile_ptr + total_lists, done)


@triton.jit
def _tile_kernel(offset_ptr, count_ptr, first_tile_ptr, tile_ptr, ROWS: tl.constexpr, PIECE: tl.constexpr):
    """Program = list: writes (list, offset, count, 0) of each of its tiles."""
    lists = tl.program_id(0)
    offset = tl.load(offset_ptr + lists)
    count = tl.load(count_ptr + lists)
    first = tl.load(first_tile_ptr + lists)
    num = (count + (ROWS - 1)) // ROWS
    for base in tl.range(0, num, PIECE):
        i = base + tl.arange(0, PIECE)
        live = i < num
        out = tile_ptr + (first + i).to(tl.int64) * 4
        tl.store(out, tl.zeros([PIECE], tl.int32) + lists, mask=live)
        tl.store(out + 1, offset + i * ROWS, mask=live)
        tl.store(out + 2, tl.minimum(count - i * ROWS, ROWS), mask=live)


@triton.jit(do_not_specialize=["total_lists", "segment"])
def _segment_scan_kernel(count_ptr, slot_ptr, first_extra_ptr, total_lists, segment):
    """One program: segments, and segments but the first, of all long lists before each list."""
    slots = tl.zeros([], tl.int32)
    extras = tl.zeros([], tl.int32)
    for base in tl.range(0, total_lists, _SCAN):
        i = base + tl.arange(0, _SCAN)
        count = tl.load(count_ptr + i, mask=i < total_lists, other=0)
        num = tl.where(count > segment, (count + segment - 1) // segment, 0)
        more = tl.maximum(num - 1, 0)
        tl.store(slot_ptr + i, slots + tl.cumsum(num, 0) - num, mask=i < total_lists)
        tl.store(first_extra_ptr + i, extras + tl.cumsum(more, 0) - more, mask=i < total_lists)
        slots += tl.sum(num, 0)
        extras += tl.sum(more, 0)
    tl.store(first_extra_ptr + total_lists, extras)


@triton.jit(do_not_specialize=["segment"])
def _segment_kernel(count_ptr, first_extra_ptr, extra_ptr, segment):
    """Program = list: (list, segment) of each of its extras."""
    lists = tl.program_id(0)
    count = tl.load(count_ptr + lists)
    first = tl.load(first_extra_ptr + lists)
    for i in tl.range(1, (count + segment - 1) // segment):
        tl.store(extra_ptr + (first + i - 1) * 2, lists)
        tl.store(extra_ptr + (first + i - 1) * 2 + 1, i)


@dataclass(frozen=True)
class Segments:
    """Lists longer than `length` entries, cut into segments; a list that all queries chose keeps no one waiting.

    extra int32 [max_extra, 2]: (list, segment) of every segment but the first, `num_extra` ([1]) of them.
    slot int32 [lists]: number of a long list's first segment among the segments of long lists.
    """

    length: int
    extra: Tensor
    num_extra: Tensor
    slot: Tensor
    max_extra: int
    max_slots: int


@dataclass(frozen=True)
class TileTable:
    """Tiles of at most `rows` list entries, list by list, for a range of tokens.

    tile int32 [bound, 4]: list, offset of the first entry, number of entries, unused. Only the first
    `num_tiles` (device scalar, [1]) are set; `bound` is what a launch grid uses.
    """

    tile: Tensor
    num_tiles: Tensor
    bound: int


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

    def segments(self, block_size: int) -> Segments | None:
        """Where long lists are cut; None where none can be long. Depends on shapes only, hence on no budget."""
        length = segment_length(self.group, self.slots, block_size)
        if self.num_tokens * self.group <= length:
            return None
        total, device = self.count.numel(), self.count.device
        max_extra = self.pairs_per_head * self.num_heads // length
        slot = torch.empty(total, dtype=torch.int32, device=device)
        first = torch.empty(total + 1, dtype=torch.int32, device=device)
        _segment_scan_kernel[(1,)](self.count, slot, first, total, length, num_warps=8)
        extra = torch.empty((max_extra, 2), dtype=torch.int32, device=device)
        _segment_kernel[(total,)](self.count, first, extra, length, num_warps=1)
        return Segments(length, extra, first[total:], slot, max_extra, 2 * max_extra)

    def tiles(self, rows: int, first_token: int, end_token: int) -> TileTable:
        """Tile table of the list parts whose tokens lie in first_token .. end_token - 1."""
        total = self.offset.numel()
        offset, count = self.offset, self.count
        device = offset.device
        if (first_token, end_token) != (0, self.num_tokens):
            offset, count = torch.empty_like(offset), torch.empty_like(count)
            _range_kernel[(common.ceil_div(total, 128),)](
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
        _tile_scan_kernel[(1,)](count, first, total, ROWS=rows, num_warps=8)
        pairs = (end_token - first_token) * self.group * self.slots * self.num_heads
        bound = pairs // rows + min(total, pairs)
        tile = torch.empty((bound, 4), dtype=torch.int32, device=device)
        _tile_kernel[(total,)](offset, count, first, tile, ROWS=rows, PIECE=128, num_warps=1)
        return TileTable(tile, first[total:], bound)


def segment_length(group: int, slots: int, block_size: int) -> int:
    """Four times the average list, and not so little that cutting costs more than waiting."""
    return max(common.MIN_SEGMENT, 4 * group * slots * block_size)


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
