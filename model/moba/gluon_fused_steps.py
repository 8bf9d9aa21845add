# mypy: disable-error-code="no-untyped-def"
"""One consumer's steps of the warp-specialised fused backward: 64 rows against its 64 keys.

Shape legend: triton_common.py; who does what: gluon_common.py; the pool of tiles: gluon_fused_rows.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from model.moba import gluon_common as common


@gluon.jit
def start_dq(pool, ds_buf, exchanged, zero, i, STAGES: gl.constexpr, HALF: gl.constexpr):
    """Half of the columns of dq [64 rows, 64] of step i - 1, under way. Before the first step: of anything."""
    slot = (i - 1) & 1
    mbarrier.wait(exchanged.index(slot), ((i - 1) >> 1) & 1)
    k0 = pool.index(2 * STAGES).slice(HALF * 64, 64, dim=1)
    k1 = pool.index(2 * STAGES + 1).slice(HALF * 64, 64, dim=1)
    dq = warpgroup_mma(ds_buf.index(2 * slot).permute((1, 0)), k0, zero, use_acc=False, is_async=True)
    return warpgroup_mma(ds_buf.index(2 * slot + 1).permute((1, 0)), k1, dq, is_async=True)


@gluon.jit
def store_dq(out_buf, to_buf, part_ptr, i, D: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr):
    """dq of step i - 1 to its pairs, a line of 128 bytes each."""
    LAY: gl.constexpr = common.row_layout(64, 4)
    out = out_buf.index(HALF)
    to = to_buf.index((i + (2 * STAGES - 1)) % (2 * STAGES)).load(gl.SliceLayout(1, LAY))
    at = to.to(gl.int64)[:, None] * D + HALF * 64 + gl.arange(0, 64, gl.SliceLayout(0, LAY))[None, :]
    gl.store(part_ptr + at, out.load(LAY), mask=((to >= 0) & (i > 0))[:, None])


@gluon.jit
def list_rows(
    pool, side, to_buf, ds_buf, out_buf, full, empty, exchanged, part_ptr, dk, dv, zero, i, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, SCORE: gl.constexpr, LEFT: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Adds the rows of step i to dk, dv [64, D], and stores dq of the step before."""
    slot = i % STAGES
    phase = (i // STAGES) & 1
    q = pool.index(2 * slot)
    dout = pool.index(2 * slot + 1)
    mbarrier.wait(full.index(slot), phase)
    score = warpgroup_mma(pool.index(2 * STAGES + HALF), q.permute((1, 0)), zero, use_acc=False, is_async=True)
    product = start_dq(pool, ds_buf, exchanged, zero, i, STAGES, HALF)
    lse = side.index(2 * slot).load(gl.SliceLayout(0, SCORE))
    s = warpgroup_mma_wait(2, deps=[score])
    p = gl.exp2(s * scale_log2 - lse[None, :])
    # Over at once, but it ends a basic block: ptxas moves the exponentials behind the wait otherwise.
    mbarrier.wait(full.index(slot), phase)
    dq, p = warpgroup_mma_wait(0, deps=[product, p])
    out_buf.index(HALF).store(dq.to(q.dtype))  # its registers take the next product
    dp = warpgroup_mma(pool.index(2 * STAGES + 2 + HALF), dout.permute((1, 0)), zero, use_acc=False, is_async=True)
    left = gl.convert_layout(p.to(q.dtype), LEFT)
    to_dv = warpgroup_mma(left, dout, dv, is_async=True)
    delta = side.index(2 * slot + 1).load(gl.SliceLayout(0, SCORE))
    dp, p = warpgroup_mma_wait(1, deps=[dp, p])
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    ds_buf.index(2 * (i & 1) + HALF).store(ds)
    fence_async_shared()  # the matrix instructions of both consumers read it
    common.release(exchanged.index(i & 1))
    right = gl.convert_layout(ds, LEFT)
    to_dk = warpgroup_mma(right, q, dk, is_async=True)
    store_dq(out_buf, to_buf, part_ptr, i, D, STAGES, HALF)
    dv, dk, left, right = warpgroup_mma_wait(0, deps=[to_dv, to_dk, left, right])
    common.release(empty.index(slot))
    return dk, dv


@gluon.jit
def own_rows(
    pool, side, full, empty, dk, dv, zero, i, key, token, scale_log2, STAGES: gl.constexpr, SCORE: gl.constexpr,
    LEFT: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Adds the rows of step i, of the block's own queries, to dk, dv."""
    slot = i % STAGES
    phase = (i // STAGES) & 1
    q = pool.index(2 * slot)
    dout = pool.index(2 * slot + 1)
    mbarrier.wait(full.index(slot), phase)
    score = warpgroup_mma(pool.index(2 * STAGES + HALF), q.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(pool.index(2 * STAGES + 2 + HALF), dout.permute((1, 0)), zero, use_acc=False, is_async=True)
    lse = side.index(2 * slot).load(gl.SliceLayout(0, SCORE))
    s = warpgroup_mma_wait(1, deps=[score])
    p = gl.exp2(s * scale_log2 - lse[None, :])
    p = gl.where(key[:, None] <= token[None, :], p, 0.0)
    left = gl.convert_layout(p.to(q.dtype), LEFT)
    delta = side.index(2 * slot + 1).load(gl.SliceLayout(0, SCORE))
    mbarrier.wait(full.index(slot), phase)
    dp, p, left = warpgroup_mma_wait(0, deps=[dp, p, left])
    to_dv = warpgroup_mma(left, dout, dv, is_async=True)
    right = gl.convert_layout((p * (dp - delta[None, :])).to(q.dtype), LEFT)
    to_dk = warpgroup_mma(right, q, dk, is_async=True)
    dv, dk, left, right = warpgroup_mma_wait(0, deps=[to_dv, to_dk, left, right])
    common.release(empty.index(slot))
    return dk, dv
