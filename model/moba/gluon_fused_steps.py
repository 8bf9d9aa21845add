# mypy: disable-error-code="no-untyped-def"
"""One consumer's steps of the warp-specialised fused backward: ROWS rows against its 64 keys.

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
def keys(pool, NUMBER: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr):
    """Half of the block's keys (NUMBER 0) or values (1), [64, D]."""
    if D == 128:
        return pool.index(2 * STAGES + 2 * NUMBER + HALF)
    else:
        return pool.index(2 * STAGES + NUMBER).slice(HALF * 64, 64, dim=0)


@gluon.jit
def start_dq(pool, ds_buf, exchanged, zero, i, D: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr):
    """This consumer's half of dq [ROWS, D] of step i - 1, a tile [64, 64], under way: half of the columns at
    head_dim 128, half of the rows at 64. Before the first step: of anything.
    """
    slot = (i - 1) & 1
    mbarrier.wait(exchanged.index(slot), ((i - 1) >> 1) & 1)
    ds0 = ds_buf.index(2 * slot)
    ds1 = ds_buf.index(2 * slot + 1)
    k0 = keys(pool, 0, D, STAGES, 0)
    k1 = keys(pool, 0, D, STAGES, 1)
    if D == 128:
        dq = warpgroup_mma(ds0.permute((1, 0)), k0.slice(HALF * 64, 64, dim=1), zero, use_acc=False, is_async=True)
        return warpgroup_mma(ds1.permute((1, 0)), k1.slice(HALF * 64, 64, dim=1), dq, is_async=True)
    else:
        dq = warpgroup_mma(ds0.slice(HALF * 64, 64, dim=1).permute((1, 0)), k0, zero, use_acc=False, is_async=True)
        return warpgroup_mma(ds1.slice(HALF * 64, 64, dim=1).permute((1, 0)), k1, dq, is_async=True)


@gluon.jit
def store_dq(out_buf, to_buf, part_ptr, i, D: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr):
    """What `start_dq` computed to its pairs, a line of 128 bytes each."""
    LAY: gl.constexpr = common.row_layout(64, 4)
    ROW: gl.constexpr = 0 if D == 128 else HALF * 64
    COLUMN: gl.constexpr = HALF * 64 if D == 128 else 0
    to = to_buf.index((i + (2 * STAGES - 1)) % (2 * STAGES)).slice(ROW, 64, dim=0).load(gl.SliceLayout(1, LAY))
    at = to.to(gl.int64)[:, None] * D + COLUMN + gl.arange(0, 64, gl.SliceLayout(0, LAY))[None, :]
    live = ((to >= 0) & (i > 0))[:, None]
    gl.store(part_ptr + at, out_buf.index(HALF).load(LAY), mask=live, cache_modifier=".cs")  # not soon read again


@gluon.jit
def list_rows(
    pool, side, to_buf, ds_buf, out_buf, full, empty, exchanged, drained, part_ptr, dk, dv, zero, zero_dq, i,
    scale_log2, D: gl.constexpr, STAGES: gl.constexpr, SCORE: gl.constexpr, LEFT: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """Adds the rows of step i to dk, dv [64, D], and stores dq of the step before.

    Between the two consumers: ds of a step is in its buffer once `exchanged`, and read once `drained`.
    """
    slot = i % STAGES
    phase = (i // STAGES) & 1
    q = pool.index(2 * slot)
    dout = pool.index(2 * slot + 1)
    mbarrier.wait(full.index(slot), phase)
    fence_async_shared()  # matrix instructions read what cp.async wrote
    k = keys(pool, 0, D, STAGES, HALF)
    v = keys(pool, 1, D, STAGES, HALF)
    score = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
    lse = side.index(2 * slot).load(gl.SliceLayout(0, SCORE))
    s = warpgroup_mma_wait(1, deps=[score])
    p = gl.exp2(s * scale_log2 - lse[None, :])
    left = gl.convert_layout(p.to(q.dtype), LEFT)
    delta = side.index(2 * slot + 1).load(gl.SliceLayout(0, SCORE))
    # The buffer of this step's ds is free: ds of two steps ago was read. It stands here because it ends a basic
    # block: ptxas moves the exponentials behind the wait for dp otherwise.
    mbarrier.wait(drained.index(i & 1), ((i >> 1) & 1) ^ 1)
    dp, p, left = warpgroup_mma_wait(0, deps=[dp, p, left])
    to_dv = warpgroup_mma(left, dout, dv, is_async=True)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    ds_buf.index(2 * (i & 1) + HALF).store(ds)
    fence_async_shared()  # the matrix instructions of both consumers read it
    common.release(exchanged.index(i & 1))
    product = start_dq(pool, ds_buf, exchanged, zero_dq, i, D, STAGES, HALF)
    right = gl.convert_layout(ds, LEFT)
    to_dk = warpgroup_mma(right, q, dk, is_async=True)
    dq, dv, left = warpgroup_mma_wait(1, deps=[product, to_dv, left])
    out_buf.index(HALF).store(dq.to(q.dtype))
    common.thread_barrier()
    mbarrier.arrive(drained.index((i - 1) & 1), count=1, pred=i > 0)
    store_dq(out_buf, to_buf, part_ptr, i, D, STAGES, HALF)
    dk, right = warpgroup_mma_wait(0, deps=[to_dk, right])
    common.release(empty.index(slot))
    return dk, dv


@gluon.jit
def own_rows(
    pool, side, full, empty, dk, dv, zero, i, key, token, scale_log2, D: gl.constexpr, STAGES: gl.constexpr,
    SCORE: gl.constexpr, LEFT: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Adds the rows of step i, of the block's own queries, to dk, dv."""
    slot = i % STAGES
    phase = (i // STAGES) & 1
    q = pool.index(2 * slot)
    dout = pool.index(2 * slot + 1)
    mbarrier.wait(full.index(slot), phase)
    fence_async_shared()  # matrix instructions read what cp.async wrote
    k = keys(pool, 0, D, STAGES, HALF)
    v = keys(pool, 1, D, STAGES, HALF)
    score = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
    lse = side.index(2 * slot).load(gl.SliceLayout(0, SCORE))
    s = warpgroup_mma_wait(1, deps=[score])
    p = gl.exp2(s * scale_log2 - lse[None, :])
    p = gl.where(key[:, None] <= token[None, :], p, 0.0)
    left = gl.convert_layout(p.to(q.dtype), LEFT)
    delta = side.index(2 * slot + 1).load(gl.SliceLayout(0, SCORE))
    mbarrier.wait(full.index(slot), phase)  # over at once: ends a basic block
    dp, p, left = warpgroup_mma_wait(0, deps=[dp, p, left])
    to_dv = warpgroup_mma(left, dout, dv, is_async=True)
    right = gl.convert_layout((p * (dp - delta[None, :])).to(q.dtype), LEFT)
    to_dk = warpgroup_mma(right, q, dk, is_async=True)
    dv, dk, left, right = warpgroup_mma_wait(0, deps=[to_dv, to_dk, left, right])
    common.release(empty.index(slot))
    return dk, dv
