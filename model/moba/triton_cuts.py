# mypy: disable-error-code="no-untyped-def"
"""Lists of pairs cut into tiles of rows and, where they are long, into segments; without the host.

Shape legend: triton_common.py; lists: triton_lists.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common

SCAN = tl.constexpr(4096)  # lists per step of the one-program scans


@triton.jit(do_not_specialize=["total_lists", "first_row", "end_row", "steps"])
def range_kernel(
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
def tile_scan_kernel(count_ptr, first_tile_ptr, total_lists, ROWS: tl.constexpr):
    """One program: first tile of every list; the entry after the last list is the number of tiles."""
    done = tl.zeros([], tl.int32)
    for base in tl.range(0, total_lists, SCAN):
        i = base + tl.arange(0, SCAN)
        count = tl.load(count_ptr + i, mask=i < total_lists, other=0)
        tiles = (count + (ROWS - 1)) // ROWS
        first = done + tl.cumsum(tiles, 0) - tiles
        done += tl.sum(tiles, 0)
        tl.store(first_tile_ptr + i, first, mask=i < total_lists)
    tl.store(first_tile_ptr + total_lists, done)


@triton.jit
def tile_kernel(offset_ptr, count_ptr, first_tile_ptr, tile_ptr, ROWS: tl.constexpr, PIECE: tl.constexpr):
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
def segment_scan_kernel(count_ptr, slot_ptr, first_extra_ptr, total_lists, segment):
    """One program: segments, and segments but the first, of all long lists before each list."""
    slots = tl.zeros([], tl.int32)
    extras = tl.zeros([], tl.int32)
    for base in tl.range(0, total_lists, SCAN):
        i = base + tl.arange(0, SCAN)
        count = tl.load(count_ptr + i, mask=i < total_lists, other=0)
        num = tl.where(count > segment, (count + segment - 1) // segment, 0)
        more = tl.maximum(num - 1, 0)
        tl.store(slot_ptr + i, slots + tl.cumsum(num, 0) - num, mask=i < total_lists)
        tl.store(first_extra_ptr + i, extras + tl.cumsum(more, 0) - more, mask=i < total_lists)
        slots += tl.sum(num, 0)
        extras += tl.sum(more, 0)
    tl.store(first_extra_ptr + total_lists, extras)


@triton.jit(do_not_specialize=["segment"])
def segment_kernel(count_ptr, first_extra_ptr, extra_ptr, segment):
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


def segment_length(group: int, slots: int, block_size: int) -> int:
    """Four times the average list, and not so little that cutting costs more than waiting."""
    return max(common.MIN_SEGMENT, 4 * group * slots * block_size)
