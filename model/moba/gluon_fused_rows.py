# mypy: disable-error-code="no-untyped-def"
"""What the groups of warps of the fused backward kernel share, and the warps that gather its rows.

Tiles [64, D] lie in one pool: q and dout of ring slot s are tiles 2 * s and 2 * s + 1, then come the two halves of
the block's keys, then those of its values.

Shape legend: triton_common.py; who does what: gluon_common.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from model.moba import gluon_common as common


@gluon.jit
def _put(
    q_ptr, dout_ptr, row, lse, delta, to, pool, side, to_buf, full, empty, step, D: gl.constexpr,
    STAGES: gl.constexpr, LAY: gl.constexpr,
):  # fmt: skip
    """Starts the copies of one step, and announces the step before, whose copies have arrived by now."""
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
    common.copy_rows(q_ptr, row, pool.index(2 * slot), D, LAY)
    common.copy_rows(dout_ptr, row, pool.index(2 * slot + 1), D, LAY)
    async_copy.commit_group()
    side.index(2 * slot).store(lse)
    side.index(2 * slot + 1).store(delta)
    to_buf.index(step % (2 * STAGES)).store(to)
    if step > 0:
        common.announce(full.index((step - 1) % STAGES), 1)


@gluon.jit
def gather(
    q_ptr, dout_ptr, pool, side, to_buf, full, empty, row_ptr, pair_ptr, list_lse_ptr, list_delta_ptr, lse_ptr,
    delta_ptr, base, begin, count, steps, own, first_key, seen, head, H, G: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Rows of the list, then those that see the keys without one (tokens first_key to seen - 1). Rows that do not
    exist get lse = infinity, hence p = 0, and the destination -1. `base`: number of the key head's first pair.

    What a step needs from memory before its copies can start is loaded a step ahead.
    """
    LAY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # a line of 128 bytes per row
    r = gl.arange(0, 64, gl.SliceLayout(1, LAY))
    n = gl.arange(0, 64, gl.BlockedLayout([1], [32], [WARPS], [0]))
    row = gl.load(row_ptr + begin + r, mask=begin + r < count, other=0)
    lse = gl.load(list_lse_ptr + begin + n, mask=begin + n < count, other=float("inf"))
    delta = gl.load(list_delta_ptr + begin + n, mask=begin + n < count, other=0.0)
    pair = gl.load(pair_ptr + begin + n, mask=begin + n < count, other=0)
    for step in range(0, steps):
        i = begin + step * 64
        to = gl.where(i + n < count, base + pair, -1)
        _put(q_ptr, dout_ptr, row, lse, delta, to, pool, side, to_buf, full, empty, step, D, STAGES, LAY)
        i += 64
        row = gl.load(row_ptr + i + r, mask=i + r < count, other=0)
        lse = gl.load(list_lse_ptr + i + n, mask=i + n < count, other=float("inf"))
        delta = gl.load(list_delta_ptr + i + n, mask=i + n < count, other=0.0)
        pair = gl.load(pair_ptr + i + n, mask=i + n < count, other=0)
    at = gl.minimum(first_key + n, seen - 1) * H + head * G
    lse = gl.load(lse_ptr + at, mask=(own > 0) & (first_key + n < seen), other=float("inf"))
    delta = gl.load(delta_ptr + at, mask=(own > 0) & (first_key + n < seen), other=0.0)
    for i in range(0, own):
        row = gl.minimum(first_key + i // G * 64 + r, seen - 1) * H + head * G + i % G
        _put(q_ptr, dout_ptr, row, lse, delta, pair, pool, side, to_buf, full, empty, steps + i, D, STAGES, LAY)
        token = first_key + (i + 1) // G * 64 + n
        at = gl.minimum(token, seen - 1) * H + head * G + (i + 1) % G
        lse = gl.load(lse_ptr + at, mask=token < seen, other=float("inf"))
        delta = gl.load(delta_ptr + at, mask=token < seen, other=0.0)
    if steps + own > 0:
        common.announce(full.index((steps + own - 1) % STAGES), 0)
