# mypy: disable-error-code="no-untyped-def"
"""`triton_dkv._dkv_kernel`, fused, with specialised warps, for Hopper: dk, dv and partial dq of blocks of 128.

Each consumer owns 64 keys of the block (FlashAttention-3, Shah et al. 2024, section 3.3, without its sums by
atomics). Rows of q and dout stream through shared memory, gathered by four warps. ds of a tile of rows is
exchanged through shared memory; its dq, one half by each consumer, is computed a tile later, when neither has to
wait for the other any more. Sums in the order of the twin's, hence its bits.

Shape legend: triton_common.py; who does what: gluon_common.py; the pool of tiles: gluon_fused_rows.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from model.moba import gluon_common as common
from model.moba import gluon_dkv_rows
from model.moba import gluon_fused_rows as rows
from model.moba import gluon_fused_steps as consumer
from model.moba.gluon_common import Work

WORK = Work(step=64, stages=3, consumer_registers=240, producer_registers=24)  # step: at head_dim 128
_GATHER_WARPS = 4


@gluon.jit
def _consume(
    pool, side, to_buf, ds_buf, out_buf, full, empty, exchanged, drained, kv_full, done, part_ptr, steps, own,
    shift, scale_log2, G: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 keys. Leaves its sums in shared memory: registers are too short to know where they go."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    dk = gl.zeros([64, D], gl.float32, OUT)
    dv = gl.zeros([64, D], gl.float32, OUT)
    zero = gl.zeros([64, ROWS], gl.float32, SCORE)
    zero_dq = gl.zeros([64, 64], gl.float32, PART)
    mbarrier.wait(kv_full, 0)
    for i in range(0, steps):
        dk, dv = consumer.list_rows(
            pool, side, to_buf, ds_buf, out_buf, full, empty, exchanged, drained, part_ptr, dk, dv, zero, zero_dq,
            i, scale_log2, D, STAGES, SCORE, LEFT, HALF,
        )  # fmt: skip
    if steps > 0:
        product = consumer.start_dq(pool, ds_buf, exchanged, zero_dq, steps, D, STAGES, HALF)
        dq = warpgroup_mma_wait(0, deps=[product])
        out_buf.index(HALF).store(dq.to(out_buf.dtype))
        common.thread_barrier()
        consumer.store_dq(out_buf, to_buf, part_ptr, steps, D, STAGES, HALF)
    key = shift + HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORE))  # from the first token of the own rows
    row = gl.arange(0, ROWS, gl.SliceLayout(0, SCORE))
    for i in range(0, own):
        dk, dv = consumer.own_rows(
            pool, side, full, empty, dk, dv, zero, steps + i, key, rows.own_token(i, row, G, ROWS)[0], scale_log2,
            D, STAGES, SCORE, LEFT, HALF,
        )  # fmt: skip
    common.release(done)
    mbarrier.wait(done, 0)  # nobody reads the pool any more
    _pieces(pool, D).index(HALF).store(dk)
    _pieces(pool, D).index(2 + HALF).store(dv)


@gluon.jit
def _pieces(pool, D: gl.constexpr):
    """The pool seen as fp32 [.., 64, D]."""
    NUM: gl.constexpr = pool.shape[0] * pool.shape[1] // 128
    return pool._reinterpret(gl.float32, [NUM, 64, D], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))


@gluon.jit(
    do_not_specialize=[
        "H",
        "num_kv_heads",
        "first_head",
        "num_heads",
        "num_lists",
        "pairs_per_head",
        "max_extra",
        "segment",
    ]
)
def _fused_kernel(
    q_ptr, dout_ptr, k_desc, v_desc, lse_ptr, delta_ptr, list_lse_ptr, list_delta_ptr, row_ptr, pair_ptr,
    offset_ptr, count_ptr, extra_ptr, num_extra_ptr, slot_ptr, block_start_ptr, block_len_ptr, reach_end_ptr,
    part_ptr, piece_ptr, dk_ptr, dv_ptr, scale_log2, softmax_scale, H, num_kv_heads, first_head, num_heads,
    num_lists, pairs_per_head, max_extra, segment, G: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr,
    SPLIT: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, MANY: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """Program = (block of 128, key head), or one more segment of a long list, as in `triton_dkv`.

    Programs without work run through without steps and store nothing.
    """
    local, block, begin, first_key, end = gluon_dkv_rows.share(
        extra_ptr, num_extra_ptr, block_start_ptr, block_len_ptr, num_heads, num_lists, 1, max_extra, segment,
        SPLIT,
    )  # fmt: skip
    head = first_head + local
    offset = gl.load(offset_ptr + local * num_lists + block)
    count = gl.load(count_ptr + local * num_lists + block)
    if SPLIT:
        count = gl.minimum(count, begin + segment)
    count = gl.where(end > 0, count, begin)
    seen = gl.load(reach_end_ptr + block)
    shift = first_key % 4  # the twin's own rows start at a multiple of four
    own = ((seen - first_key + shift + 63) // 64 * G + (ROWS // 64 - 1)) // (ROWS // 64)
    own = gl.where((begin == 0) & (end > 0), own, 0)
    steps = (count - begin + (ROWS - 1)) // ROWS

    dtype: gl.constexpr = k_desc.dtype
    TILES: gl.constexpr = 128 // ROWS  # of keys, and of values
    ONE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, ROWS], dtype)
    PART: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    pool = gl.allocate_shared_memory(dtype, [2 * STAGES + 2 * TILES, ROWS, D], k_desc.layout)
    ds_buf = gl.allocate_shared_memory(dtype, [4, 64, ROWS], DS)
    out_buf = gl.allocate_shared_memory(dtype, [2, 64, 64], PART)
    side = gl.allocate_shared_memory(gl.float32, [2 * STAGES, ROWS], ONE)
    to_buf = gl.allocate_shared_memory(gl.int32, [2 * STAGES, ROWS], ONE)  # read a step later: twice as many
    full = common.barriers(STAGES, WARPS * 32 + 1)
    empty = common.barriers(STAGES, 2)
    exchanged = common.barriers(2, 2)
    drained = common.barriers(2, 2)
    kv_full = common.barriers(1, 1).index(0)
    done = common.barriers(1, 2).index(0)
    fence_async_shared()
    common.thread_barrier()
    mbarrier.expect(kv_full, 2 * TILES * k_desc.block_type.nbytes)
    for i in gl.static_range(TILES):
        corner = [first_key + i * ROWS, head * D]
        tma.async_copy_global_to_shared(k_desc, corner, kv_full, pool.index(2 * STAGES + i))
        tma.async_copy_global_to_shared(v_desc, corner, kv_full, pool.index(2 * STAGES + TILES + i))
    gl.warp_specialize(
        [
            (_consume, (pool, side, to_buf, ds_buf, out_buf, full, empty, exchanged, drained, kv_full, done,
                        part_ptr, steps, own, shift, scale_log2, G, ROWS, D, STAGES, 0)),
            (_consume, (pool, side, to_buf, ds_buf, out_buf, full, empty, exchanged, drained, kv_full, done,
                        part_ptr, steps, own, shift, scale_log2, G, ROWS, D, STAGES, 1)),
            (rows.gather, (q_ptr, dout_ptr, pool, side, to_buf, full, empty, row_ptr + offset, pair_ptr + offset,
                           list_lse_ptr + offset, list_delta_ptr + offset, lse_ptr, delta_ptr,
                           local * pairs_per_head, begin, count, steps, own, first_key - shift, seen, head, H, G,
                           ROWS, D, STAGES, WARPS)),
        ],
        [4, WARPS],
        [MANY, FEW],
    )  # fmt: skip
    whole = True
    place = gl.to_tensor(0).to(gl.int64)
    if SPLIT:
        whole = gl.load(count_ptr + local * num_lists + block) <= segment
        slot = gl.load(slot_ptr + local * num_lists + block) + begin // segment
        place = slot.to(gl.int64) * 256
    LAY: gl.constexpr = gluon_dkv_rows.sums_layout(D)
    for half in gl.static_range(2):
        dk = _pieces(pool, D).index(half).load(LAY)
        dv = _pieces(pool, D).index(2 + half).load(LAY)
        gluon_dkv_rows.store_sums(dk, dv, half, whole, place, dk_ptr, dv_ptr, piece_ptr, first_key, end, head,
                                  num_kv_heads, softmax_scale, 128 * D, D, SPLIT, LAY)  # fmt: skip


def rows_per_step(head_dim: int, work: Work = WORK) -> int:
    """Query rows of a step: a tile of 16 KiB."""
    return work.step * 128 // head_dim


def constants(head_dim: int, group: int, split: bool, work: Work = WORK) -> dict[str, int | bool]:
    """The kernel's compile-time arguments."""
    return {
        "G": group,
        "ROWS": rows_per_step(head_dim, work),
        "D": head_dim,
        "SPLIT": split,
        "STAGES": work.stages,
        "WARPS": _GATHER_WARPS,
        "MANY": work.consumer_registers,
        "FEW": work.producer_registers,
    }
