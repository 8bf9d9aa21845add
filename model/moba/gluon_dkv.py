# mypy: disable-error-code="no-untyped-def"
"""`triton_dkv._dkv_kernel` (not fused) with specialised warps, for Hopper. Same arguments, sums and order of sums.

Each consumer owns 64 keys of a block. Rows of q and dout, first those of the list, then those of the own block,
stream through shared memory, gathered by four warps.

Shape legend: triton_common.py; who does what: gluon_common.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from model.moba import gluon_common as common
from model.moba import gluon_dkv_rows as rows
from model.moba.gluon_common import Work

WORK = Work(step=64, stages=4, consumer_registers=232, producer_registers=40)
_GATHER_WARPS = 4


@gluon.jit
def _add_rows(
    q_buf, dout_buf, lse_buf, delta_buf, full, empty, k, v, dk, dv, zero, i, key, token, scale_log2,
    MASK: gl.constexpr, STAGES: gl.constexpr, SCORE: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """Adds the rows of step i to dk, dv [64, D]; scores are transposed, [64 keys, ROWS]."""
    slot = i % STAGES
    phase = (i // STAGES) & 1
    q = q_buf.index(slot)
    dout = dout_buf.index(slot)
    mbarrier.wait(full.index(slot), phase)
    score = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
    lse = lse_buf.index(slot).load(gl.SliceLayout(0, SCORE))
    s = warpgroup_mma_wait(1, deps=[score])
    p = gl.exp2(s * scale_log2 - lse[None, :])
    if MASK:
        p = gl.where(key[:, None] <= token[None, :], p, 0.0)
    left = gl.convert_layout(p.to(q.dtype), LEFT)
    delta = delta_buf.index(slot).load(gl.SliceLayout(0, SCORE))
    # Over at once, but it ends a basic block: ptxas moves the exponentials behind the wait otherwise.
    mbarrier.wait(full.index(slot), phase)
    dp, p, left = warpgroup_mma_wait(0, deps=[dp, p, left])
    to_dv = warpgroup_mma(left, dout, dv, is_async=True)
    ds = gl.convert_layout((p * (dp - delta[None, :])).to(q.dtype), LEFT)
    to_dk = warpgroup_mma(ds, q, dk, is_async=True)
    dv, dk, left, ds = warpgroup_mma_wait(0, deps=[to_dv, to_dk, left, ds])
    common.release(empty.index(slot))
    return dk, dv


@gluon.jit
def _sum(
    q_buf, dout_buf, lse_buf, delta_buf, k_buf, v_buf, full, empty, kv_full, done, steps, own, scale_log2,
    G: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 keys. Leaves its sums in shared memory: registers are too short to know where they go."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    k = k_buf.index(HALF)
    v = v_buf.index(HALF)
    dk = gl.zeros([64, D], gl.float32, OUT)
    dv = gl.zeros([64, D], gl.float32, OUT)
    zero = gl.zeros([64, ROWS], gl.float32, SCORE)
    key = HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORE))  # from first_key
    token = gl.arange(0, ROWS, gl.SliceLayout(0, SCORE))
    mbarrier.wait(kv_full, 0)
    for i in range(0, steps):
        dk, dv = _add_rows(
            q_buf, dout_buf, lse_buf, delta_buf, full, empty, k, v, dk, dv, zero, i, key, token, scale_log2, False,
            STAGES, SCORE, LEFT,
        )  # fmt: skip
    for i in range(0, own):
        dk, dv = _add_rows(
            q_buf, dout_buf, lse_buf, delta_buf, full, empty, k, v, dk, dv, zero, steps + i, key,
            i // G * ROWS + token, scale_log2, True, STAGES, SCORE, LEFT,
        )  # fmt: skip
    common.release(done)
    mbarrier.wait(done, 0)  # nobody reads rows any more
    _pieces(q_buf, D).index(HALF).store(dk)
    _pieces(dout_buf, D).index(HALF).store(dv)


@gluon.jit
def _pieces(buf, D: gl.constexpr):
    """A ring of rows seen as fp32 [2, 64, D]."""
    return buf._reinterpret(gl.float32, [2, 64, D], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))


@gluon.jit(
    do_not_specialize=[
        "H",
        "num_kv_heads",
        "first_head",
        "num_heads",
        "num_lists",
        "num_subs",
        "max_extra",
        "segment",
    ]
)
def _dkv_kernel(
    q_ptr, dout_ptr, k_desc, v_desc, lse_ptr, delta_ptr, list_lse_ptr, list_delta_ptr, row_ptr, offset_ptr,
    count_ptr, extra_ptr, num_extra_ptr, slot_ptr, block_start_ptr, block_len_ptr, reach_end_ptr, piece_ptr,
    dk_ptr, dv_ptr, scale_log2, softmax_scale, H, num_kv_heads, first_head, num_heads, num_lists, num_subs,
    block_size, max_extra, segment, G: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr, MANY: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """Program = (block, key head, 128 of its keys), or one more segment of a long list, as in `triton_dkv`.

    Programs without work run through without steps and store nothing.
    """
    local, block, begin, first_key, end = rows.share(
        extra_ptr, num_extra_ptr, block_start_ptr, block_len_ptr, num_heads, num_lists, num_subs, max_extra,
        segment, SPLIT,
    )  # fmt: skip
    head = first_head + local
    offset = gl.load(offset_ptr + local * num_lists + block)
    count = gl.load(count_ptr + local * num_lists + block)
    if SPLIT:
        count = gl.minimum(count, begin + segment)
    count = gl.where(end > 0, count, begin)
    seen = gl.load(reach_end_ptr + block)
    own = gl.where((begin == 0) & (end > 0), (seen - first_key + (ROWS - 1)) // ROWS * G, 0)
    steps = (count - begin + (ROWS - 1)) // ROWS

    dtype: gl.constexpr = k_desc.dtype
    ONE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_buf = gl.allocate_shared_memory(dtype, [2, 64, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(dtype, [2, 64, D], k_desc.layout)
    q_buf = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], k_desc.layout)
    dout_buf = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], k_desc.layout)
    lse_buf = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], ONE)
    delta_buf = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], ONE)
    full = common.barriers(STAGES, 1)
    empty = common.barriers(STAGES, 2)
    kv_full = common.barriers(1, 1).index(0)
    done = common.barriers(1, 2).index(0)
    fence_async_shared()
    common.thread_barrier()
    mbarrier.expect(kv_full, 4 * k_desc.block_type.nbytes)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(k_desc, [first_key + i * 64, head * D], kv_full, k_buf.index(i))
        tma.async_copy_global_to_shared(v_desc, [first_key + i * 64, head * D], kv_full, v_buf.index(i))
    gl.warp_specialize(
        [
            (_sum, (q_buf, dout_buf, lse_buf, delta_buf, k_buf, v_buf, full, empty, kv_full, done, steps, own,
                    scale_log2, G, ROWS, D, STAGES, 0)),
            (_sum, (q_buf, dout_buf, lse_buf, delta_buf, k_buf, v_buf, full, empty, kv_full, done, steps, own,
                    scale_log2, G, ROWS, D, STAGES, 1)),
            (rows.gather, (q_ptr, dout_ptr, q_buf, dout_buf, lse_buf, delta_buf, full, empty, row_ptr + offset,
                           list_lse_ptr + offset, list_delta_ptr + offset, lse_ptr, delta_ptr, begin, count, steps,
                           own, first_key, seen, head, H, G, ROWS, D, STAGES, WARPS)),
        ],
        [4, WARPS],
        [MANY, FEW],
    )  # fmt: skip
    whole = True
    place = gl.to_tensor(0).to(gl.int64)
    if SPLIT:
        whole = gl.load(count_ptr + local * num_lists + block) <= segment
        slot = gl.load(slot_ptr + local * num_lists + block) + begin // segment
        place = slot.to(gl.int64) * (2 * block_size) + gl.program_id(0) % num_subs * 128
    LAY: gl.constexpr = rows.sums_layout(D)
    for half in gl.static_range(2):
        dk = _pieces(q_buf, D).index(half).load(LAY)
        dv = _pieces(dout_buf, D).index(half).load(LAY)
        rows.store_sums(dk, dv, half, whole, place, dk_ptr, dv_ptr, piece_ptr, first_key, end, head, num_kv_heads,
                        softmax_scale, block_size.to(gl.int64) * D, D, SPLIT, LAY)  # fmt: skip


def constants(head_dim: int, group: int, split: bool, work: Work = WORK) -> dict[str, int | bool]:
    """The kernel's compile-time arguments."""
    return {
        "G": group,
        "ROWS": work.step,
        "D": head_dim,
        "SPLIT": split,
        "STAGES": work.stages,
        "WARPS": _GATHER_WARPS,
        "MANY": work.consumer_registers,
        "FEW": work.producer_registers,
    }
