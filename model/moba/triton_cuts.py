# mypy: disable-error-code="no-untyped-def"
"""Lists of pairs: where each starts, its tiles of rows and, where it is long, its segments; without the host.

Shape legend: triton_common.py; lists: triton_lists.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common

_MAX_SCAN = 4096  # lists per step of the one-program scan


@triton.jit
def _scan_tiles(count, done, first_ptr, i, live, ROWS: tl.constexpr):
    """First tile of each list; returns the tiles so far."""
    tiles = (count + (ROWS - 1)) // ROWS
    tl.store(first_ptr + i, done + tl.cumsum(tiles, 0) - tiles, mask=live)
    return done + tl.sum(tiles, 0)


@triton.jit(do_not_specialize=["total_lists", "num_lists", "segment"])
def _layout_kernel(
    total_ptr, offset_ptr, count_ptr, first_ptr, num_ptr, first_dq_ptr, num_dq_ptr, slot_ptr, first_extra_ptr,
    num_extra_ptr, total_lists, num_lists, segment,
    PLACE: tl.constexpr, ROWS: tl.constexpr, ROWS_DQ: tl.constexpr, SEGMENTS: tl.constexpr, ALIGN: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """One program, over all lists: with PLACE aligned offset and length; then first tiles, first segments.

    The last list of a head (empty slots) gets length 0. `slot`: segments of long lists before each list;
    `first_extra`: the same without the first segment of each.
    """
    placed = tl.zeros([], tl.int32)
    tiles = tl.zeros([], tl.int32)
    tiles_dq = tl.zeros([], tl.int32)
    slots = tl.zeros([], tl.int32)
    extras = tl.zeros([], tl.int32)
    for base in tl.range(0, total_lists, SCAN):
        i = base + tl.arange(0, SCAN)
        live = i < total_lists
        if PLACE:
            count = tl.load(total_ptr + i, mask=live & (i % num_lists != num_lists - 1), other=0)
            padded = (count + (ALIGN - 1)) // ALIGN * ALIGN
            tl.store(offset_ptr + i, placed + tl.cumsum(padded, 0) - padded, mask=live)
            tl.store(count_ptr + i, count, mask=live)
            placed += tl.sum(padded, 0)
        else:
            count = tl.load(count_ptr + i, mask=live, other=0)
        if ROWS > 0:
            tiles = _scan_tiles(count, tiles, first_ptr, i, live, ROWS)
        if ROWS_DQ > 0:
            tiles_dq = _scan_tiles(count, tiles_dq, first_dq_ptr, i, live, ROWS_DQ)
        if SEGMENTS:
            num = tl.where(count > segment, (count + segment - 1) // segment, 0)
            more = tl.maximum(num - 1, 0)
            tl.store(slot_ptr + i, slots + tl.cumsum(num, 0) - num, mask=live)
            tl.store(first_extra_ptr + i, extras + tl.cumsum(more, 0) - more, mask=live)
            slots += tl.sum(num, 0)
            extras += tl.sum(more, 0)
    if ROWS > 0:
        tl.store(num_ptr, tiles)
    if ROWS_DQ > 0:
        tl.store(num_dq_ptr, tiles_dq)
    if SEGMENTS:
        tl.store(num_extra_ptr, extras)


@triton.jit
def _fill_tiles(lists, offset, count, first_ptr, tile_ptr, ROWS: tl.constexpr, PIECE: tl.constexpr):
    """Writes (list, offset, count, unset) of each tile of a list."""
    first = tl.load(first_ptr + lists)
    num = (count + (ROWS - 1)) // ROWS
    for base in tl.range(0, num, PIECE):
        i = base + tl.arange(0, PIECE)
        live = i < num
        out = tile_ptr + (first + i).to(tl.int64) * 4
        tl.store(out, tl.zeros([PIECE], tl.int32) + lists, mask=live)
        tl.store(out + 1, offset + i * ROWS, mask=live)
        tl.store(out + 2, tl.minimum(count - i * ROWS, ROWS), mask=live)


@triton.jit(do_not_specialize=["segment"])
def _fill_kernel(
    offset_ptr, count_ptr, first_ptr, tile_ptr, first_dq_ptr, tile_dq_ptr, first_extra_ptr, extra_ptr, segment,
    ROWS: tl.constexpr, ROWS_DQ: tl.constexpr, SEGMENTS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Program = list: its tiles, and (list, segment) of each of its segments but the first."""
    lists = tl.program_id(0)
    offset = tl.load(offset_ptr + lists)
    count = tl.load(count_ptr + lists)
    if ROWS > 0:
        _fill_tiles(lists, offset, count, first_ptr, tile_ptr, ROWS, PIECE)
    if ROWS_DQ > 0:
        _fill_tiles(lists, offset, count, first_dq_ptr, tile_dq_ptr, ROWS_DQ, PIECE)
    if SEGMENTS:
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

    tile int32 [bound * 4]: list, offset of the first entry, number of entries, unused. Only the first
    `num_tiles` (device scalar, [1]) are set; `bound` is what a launch grid uses.
    """

    tile: Tensor
    num_tiles: Tensor
    bound: int


@dataclass(frozen=True)
class Cuts:
    """How the lists of some key heads are cut: rows per tile of the forward and of the dq kernel, segments.

    rows, rows_dq: 0 = no such tiles. segment: entries; 0 = no list can be longer.
    """

    rows: int = 0
    rows_dq: int = 0
    segment: int = 0

    def sizes(self, total_lists: int, pairs: int) -> dict[str, int]:
        """int32 elements of what `lay_out` fills. All bounds come from shapes."""
        tiled, tiled_dq, cut = (total_lists * (n > 0) for n in (self.rows, self.rows_dq, self.segment))
        return {
            **dict.fromkeys(("offset", "count"), total_lists),
            **{"first": tiled, "first_dq": tiled_dq, "slot": cut, "first_extra": cut},
            **dict.fromkeys(("num", "num_dq", "num_extra"), 1),
            "tile": 4 * self.bound(self.rows, total_lists, pairs),
            "tile_dq": 4 * self.bound(self.rows_dq, total_lists, pairs),
            "extra": 2 * self.max_extra(pairs),
        }

    @staticmethod
    def bound(rows: int, total_lists: int, pairs: int) -> int:
        return pairs // rows + min(total_lists, pairs) if rows else 0

    def max_extra(self, pairs: int) -> int:
        return pairs // self.segment if self.segment else 0


def segment_length(num_tokens: int, group: int, slots: int, block_size: int) -> int:
    """Four times the average list, and not so little that cutting costs more than waiting; 0: no list is longer.

    Depends on shapes only, hence on no budget.
    """
    length = max(common.MIN_SEGMENT, 4 * group * slots * block_size)
    return length if num_tokens * group > length else 0


def place(total: Tensor | None, cuts: Cuts, num_lists: int, out: dict[str, Tensor]) -> None:
    """Offsets, lengths and first tiles of all lists, from their lengths `total` or, without, from out["count"]."""
    lists = out["count"].numel()
    names = ("offset", "count", "first", "num", "first_dq", "num_dq", "slot", "first_extra", "num_extra")
    _layout_kernel[(1,)](
        out["count"] if total is None else total,
        *(out[name] for name in names),
        lists,
        num_lists,
        cuts.segment,
        PLACE=total is not None,
        ROWS=cuts.rows,
        ROWS_DQ=cuts.rows_dq,
        SEGMENTS=cuts.segment > 0,
        ALIGN=common.LIST_ALIGN,
        SCAN=min(_MAX_SCAN, max(128, common.next_power_of_two(lists))),
        num_warps=8,
    )


def fill(cuts: Cuts, out: dict[str, Tensor]) -> None:
    """The tiles and segments of all lists, once `place` has counted them."""
    if cuts == Cuts():
        return
    names = ("offset", "count", "first", "tile", "first_dq", "tile_dq", "first_extra", "extra")
    _fill_kernel[(out["count"].numel(),)](
        *(out[name] for name in names),
        cuts.segment,
        ROWS=cuts.rows,
        ROWS_DQ=cuts.rows_dq,
        SEGMENTS=cuts.segment > 0,
        PIECE=128,
        num_warps=1,
    )
