# mypy: disable-error-code="no-untyped-def"
"""Rows of the lists for the warp-specialised kernels that walk tiles of pairs, and the way of results back.

A tile is up to 128 entries of one list, half of it for each consumer. What has to be known of a tile before its
rows can be copied (three loads, each on the one before) is loaded while the tile before is worked on.

Shape legend: triton_common.py; who does what: gluon_common.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from model.moba import gluon_common as common

_PIECE = gl.constexpr(16)  # rows whose addresses are held at a time: a gathering warp has few registers


@gluon.jit
def half_tile(
    tile_ptr, tile, row_ptr, pair_ptr, num_lists, pair_base, pairs_per_head, HALF: gl.constexpr, LINE: gl.constexpr
):
    """One consumer's entries of a tile, in the layout LINE: place in the list, whether there is such an entry, its
    row id, and the row of `part` (an int32; -1: nowhere) where its result goes.
    """
    lists = gl.load(tile_ptr + tile * 4)
    offset = gl.load(tile_ptr + tile * 4 + 1)
    count = gl.load(tile_ptr + tile * 4 + 2)
    r = HALF * 64 + gl.arange(0, 64, LINE)
    live = r < count
    row = gl.load(row_ptr + offset + gl.minimum(r, count - 1))
    pair = gl.load(pair_ptr + offset + r, mask=live, other=0)
    base = (lists // num_lists).to(gl.int64) * pairs_per_head - pair_base
    return offset + r, live, row, gl.where(live, (base + pair).to(gl.int32), -1)


@gluon.jit
def copy_half(x_ptr, ids, buf, D: gl.constexpr):
    """One warp: starts copies of the 64 rows of x named in `ids` (shared memory) into buf [64, D]."""
    LAY: gl.constexpr = common.row_layout(D, 1)
    for i in gl.static_range(64 // _PIECE):
        row = ids.slice(i * _PIECE, _PIECE).load(gl.SliceLayout(1, LAY))
        at = x_ptr + row.to(gl.int64)[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, LAY))[None, :]
        async_copy.async_copy_global_to_shared(buf.slice(i * _PIECE, _PIECE), at)


@gluon.constexpr_function
def swapped_layout(dim, times):
    """Sums [64, dim] of a consumer after one or two swaps of columns among four threads: 4, 8 columns a thread.

    A swap moves one bit of the column from threads to registers and one back, which takes shuffles alone; two bits
    at once would go through shared memory.
    """
    free = [[0, column] for column in (32, 64) if column < dim]
    registers = {1: [[0, 1], [0, 2], [8, 0], [0, 16]], 2: [[0, 1], [0, 2], [0, 4], [8, 0]]}
    threads = {1: [[0, 8], [0, 4]], 2: [[0, 8], [0, 16]]}
    return gl.DistributedLinearLayout(
        reg_bases=registers[times] + free,
        lane_bases=threads[times] + [[1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, dim],
    )


@gluon.jit
def store_swapped(x, to, out_ptr, D: gl.constexpr):
    """Rows x [64, D] of one consumer to the rows `to` of `out` (-1: nowhere; a slice of swapped_layout(D, 2)).

    Straight from registers, 16 bytes a thread and 64 of a row together: whole sectors.
    """
    WIDE: gl.constexpr = swapped_layout(D, 2)
    at = to.to(gl.int64)[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, WIDE))[None, :]
    x = gl.convert_layout(gl.convert_layout(x, swapped_layout(D, 1)), WIDE)
    gl.store(out_ptr + at, x, mask=(to >= 0)[:, None])
