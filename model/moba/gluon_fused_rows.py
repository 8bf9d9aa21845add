# mypy: disable-error-code="no-untyped-def"
"""What the groups of warps of the fused backward kernel share, and the warps that gather its rows.

Tiles of 16 KiB, [ROWS, D], lie in one pool: q and dout of ring slot s are tiles 2 * s and 2 * s + 1, then come the
128 keys of the block (two tiles at head_dim 128, one at 64), then its values.

Shape legend: triton_common.py; who does what: gluon_common.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from model.moba import gluon_common as common


@gluon.jit
def own_token(i, r, G: gl.constexpr, ROWS: gl.constexpr):
    """Row r of step i of the own rows: token (from the first) and head in its group. 64 tokens of one head follow
    the same tokens of the head before, whatever a step takes: the twin's order.
    """
    if ROWS == 64:
        token = i // G * 64 + r
        group = i % G
    else:
        piece = i * (ROWS // 64) + r // 64
        token = piece // G * 64 + r % 64
        group = piece % G
    return token, group


@gluon.jit
def _own_sums(lse_ptr, delta_ptr, i, n, first, seen, head, H, G: gl.constexpr, ROWS: gl.constexpr):
    """lse and delta of the rows of step i of the own rows."""
    token, group = own_token(i, n, G, ROWS)
    at = gl.minimum(first + token, seen - 1) * H + head * G + group
    lse = gl.load(lse_ptr + at, mask=first + token < seen, other=float("inf"))
    delta = gl.load(delta_ptr + at, mask=first + token < seen, other=0.0)
    return lse, delta


@gluon.jit
def _put(
    q_ptr, dout_ptr, row, lse, delta, to, pool, side, to_buf, full, empty, step, D: gl.constexpr,
    STAGES: gl.constexpr, LAY: gl.constexpr,
):  # fmt: skip
    """Starts the copies of one step. `full` completes when those of every thread have arrived and lse, delta and
    destinations are there; consumers fence what they read by matrix instructions themselves.
    """
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
    common.copy_rows(q_ptr, row, pool.index(2 * slot), D, LAY)
    common.copy_rows(dout_ptr, row, pool.index(2 * slot + 1), D, LAY)
    async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
    side.index(2 * slot).store(lse)
    side.index(2 * slot + 1).store(delta)
    to_buf.index(step % (2 * STAGES)).store(to)
    common.release(full.index(slot))


@gluon.jit
def gather(
    q_ptr, dout_ptr, pool, side, to_buf, full, empty, row_ptr, pair_ptr, list_lse_ptr, list_delta_ptr, lse_ptr,
    delta_ptr, base, begin, count, steps, own, first, seen, head, H, G: gl.constexpr, ROWS: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Rows of the list, then those that see the keys without one (tokens first to seen - 1). Rows that do not
    exist get lse = infinity, hence p = 0, and the destination -1. `base`: number of the key head's first pair.

    What a step needs from memory before its copies can start is loaded a step ahead.
    """
    LAY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # a line of 128 bytes per row
    r = gl.arange(0, ROWS, gl.SliceLayout(1, LAY))
    n = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    row = gl.load(row_ptr + begin + r, mask=begin + r < count, other=0)
    lse = gl.load(list_lse_ptr + begin + n, mask=begin + n < count, other=float("inf"))
    delta = gl.load(list_delta_ptr + begin + n, mask=begin + n < count, other=0.0)
    pair = gl.load(pair_ptr + begin + n, mask=begin + n < count, other=0)
    for step in range(0, steps):
        i = begin + step * ROWS
        to = gl.where(i + n < count, base + pair, -1)
        _put(q_ptr, dout_ptr, row, lse, delta, to, pool, side, to_buf, full, empty, step, D, STAGES, LAY)
        i += ROWS
        row = gl.load(row_ptr + i + r, mask=i + r < count, other=0)
        lse = gl.load(list_lse_ptr + i + n, mask=i + n < count, other=float("inf"))
        delta = gl.load(list_delta_ptr + i + n, mask=i + n < count, other=0.0)
        pair = gl.load(pair_ptr + i + n, mask=i + n < count, other=0)
    if own > 0:
        lse, delta = _own_sums(lse_ptr, delta_ptr, 0, n, first, seen, head, H, G, ROWS)
    for i in range(0, own):
        token, group = own_token(i, r, G, ROWS)
        row = gl.minimum(first + token, seen - 1) * H + head * G + group
        _put(q_ptr, dout_ptr, row, lse, delta, pair, pool, side, to_buf, full, empty, steps + i, D, STAGES, LAY)
        lse, delta = _own_sums(lse_ptr, delta_ptr, i + 1, n, first, seen, head, H, G, ROWS)
