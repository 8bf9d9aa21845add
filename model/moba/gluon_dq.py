# mypy: disable-error-code="no-untyped-def"
"""`triton_dq._dq_kernel` with specialised warps, for Hopper. Same arguments and results.

One consumer's exponentials and differences run while the other's products do.

Shape legend: triton_common.py; who does what: gluon_common.py.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from model.moba import gluon_common as common
from model.moba import gluon_pairs as pairs
from model.moba.blocks import BlockTable
from model.moba.gluon_common import Work
from model.moba.triton_cuts import TileTable
from model.moba.triton_lists import Lists
from model.moba.triton_sums import RowSums

WORK = Work(step=128, stages=2, consumer_registers=224, producer_registers=56)
_RING = gl.constexpr(3)  # halves of tiles


@gluon.jit
def _gather(
    q_ptr, dout_ptr, q_buf, dout_buf, sums_buf, to_buf, full, empty, lse_ptr, delta_ptr, list_lse_ptr,
    list_delta_ptr, row_ptr, pair_ptr, tile_ptr, num_tiles, num_lists, pair_base, pairs_per_head, D: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """One warp: one consumer's rows of q and dout, lse and delta (copied into list order too), where results go.

    The halves of all tiles take turns in one ring of three. While two are worked on, the third is filled for
    whoever comes first; the other's rows follow when that one is through with its own, so the two do not come to
    the ends of their tiles at the same time.
    """
    LINE: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    num = HALF
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        entry, live, row, to = pairs.half_tile(
            tile_ptr, tile, row_ptr, pair_ptr, num_lists, pair_base, pairs_per_head, HALF, LINE
        )
        lse = gl.load(lse_ptr + row)
        delta = gl.load(delta_ptr + row)
        slot = num % _RING
        places = to_buf.index(slot)
        mbarrier.wait(empty.index(slot), ((num // _RING) & 1) ^ 1)
        places.store(row)  # until the copies have started
        common.thread_barrier()
        pairs.copy_half(q_ptr, places, q_buf.index(slot), D)
        pairs.copy_half(dout_ptr, places, dout_buf.index(slot), D)
        async_copy.commit_group()
        common.thread_barrier()
        places.store(to)
        sums_buf.index(slot).store(lse)
        sums_buf.index(_RING + slot).store(delta)
        gl.store(list_lse_ptr + entry, lse, mask=live)
        gl.store(list_delta_ptr + entry, delta, mask=live)
        common.announce(full.index(slot), 0)
        num += 2


@gluon.jit
def _gradient(
    q_buf, dout_buf, sums_buf, to_buf, k_buf, v_buf, full, empty, k_full, k_empty, v_full, v_empty, part_ptr,
    num_tiles, scale_log2, block_size, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 rows of every tile."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    dtype: gl.constexpr = k_buf.dtype
    zero = gl.zeros([64, KEYS], gl.float32, SCORE)
    step = 0
    num = HALF
    for _ in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        dq = gl.zeros([64, D], gl.float32, OUT)
        rows = num % _RING
        q = q_buf.index(rows)
        dout = dout_buf.index(rows)
        mbarrier.wait(full.index(rows), (num // _RING) & 1)
        lse = sums_buf.index(rows).load(gl.SliceLayout(1, SCORE))
        delta = sums_buf.index(_RING + rows).load(gl.SliceLayout(1, SCORE))
        to = to_buf.index(rows).load(gl.SliceLayout(1, pairs.swapped_layout(D, 2)))
        for j in range(0, block_size, KEYS):
            slot = step % STAGES
            phase = (step // STAGES) & 1
            k = k_buf.index(slot)
            mbarrier.wait(k_full.index(slot), phase)
            score = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(slot), phase)
            dp = warpgroup_mma(dout, v_buf.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[score])
            p = gl.exp2(s * scale_log2 - lse[:, None])
            # Over at once, but it ends a basic block: ptxas moves the exponentials behind the wait otherwise.
            mbarrier.wait(v_full.index(slot), phase)
            dp, p = warpgroup_mma_wait(0, deps=[dp, p])
            common.release(v_empty.index(slot))
            mbarrier.arrive(empty.index(rows), count=1, pred=j + KEYS >= block_size)
            left = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), LEFT)
            product = warpgroup_mma(left, k, dq, is_async=True)
            dq, left = warpgroup_mma_wait(0, deps=[product, left])
            common.release(k_empty.index(slot))
            step += 1
        pairs.store_swapped(dq.to(dtype), to, part_ptr, D)
        num += 2


@gluon.jit(do_not_specialize=["num_lists", "first_head", "pair_base", "pairs_per_head"])
def _dq_kernel(
    q_ptr,
    dout_ptr,
    k_desc,
    v_desc,
    lse_ptr,
    delta_ptr,
    part_ptr,
    row_ptr,
    pair_ptr,
    list_lse_ptr,
    list_delta_ptr,
    tile_ptr,
    num_tiles_ptr,
    block_start_ptr,
    scale_log2,
    block_size,
    num_lists,
    first_head,
    pair_base,
    pairs_per_head,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    MANY: gl.constexpr,
    FEW: gl.constexpr,
):
    """Program = every num_programs-th tile of up to 128 pairs of one block; block_size % KEYS == 0."""
    dtype: gl.constexpr = k_desc.dtype
    ONE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_buf = gl.allocate_shared_memory(dtype, [_RING, 64, D], k_desc.layout)
    dout_buf = gl.allocate_shared_memory(dtype, [_RING, 64, D], k_desc.layout)
    k_buf = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], k_desc.layout)
    sums_buf = gl.allocate_shared_memory(gl.float32, [2 * _RING, 64], ONE)  # lse, delta
    to_buf = gl.allocate_shared_memory(gl.int32, [_RING, 64], ONE)
    full = common.barriers(_RING, 1)
    empty = common.barriers(_RING, 1)
    k_full = common.barriers(STAGES, 1)
    k_empty = common.barriers(STAGES, 2)
    v_full = common.barriers(STAGES, 1)
    v_empty = common.barriers(STAGES, 2)
    fence_async_shared()
    common.thread_barrier()
    num_tiles = gl.load(num_tiles_ptr)
    gl.warp_specialize(
        [
            (_gradient, (q_buf, dout_buf, sums_buf, to_buf, k_buf, v_buf, full, empty, k_full, k_empty, v_full,
                         v_empty, part_ptr, num_tiles, scale_log2, block_size, D, KEYS, STAGES, 0)),
            (_gradient, (q_buf, dout_buf, sums_buf, to_buf, k_buf, v_buf, full, empty, k_full, k_empty, v_full,
                         v_empty, part_ptr, num_tiles, scale_log2, block_size, D, KEYS, STAGES, 1)),
            (_gather, (q_ptr, dout_ptr, q_buf, dout_buf, sums_buf, to_buf, full, empty, lse_ptr, delta_ptr,
                       list_lse_ptr, list_delta_ptr, row_ptr, pair_ptr, tile_ptr, num_tiles, num_lists, pair_base,
                       pairs_per_head, D, 0)),
            (_gather, (q_ptr, dout_ptr, q_buf, dout_buf, sums_buf, to_buf, full, empty, lse_ptr, delta_ptr,
                       list_lse_ptr, list_delta_ptr, row_ptr, pair_ptr, tile_ptr, num_tiles, num_lists, pair_base,
                       pairs_per_head, D, 1)),
            (common.kv_producer, (k_desc, v_desc, k_buf, v_buf, k_full, k_empty, v_full, v_empty, tile_ptr,
                                  num_tiles, block_start_ptr, block_size, num_lists, first_head, D, KEYS, STAGES)),
        ],
        [4, 1, 1, 1],
        [MANY, FEW, FEW, FEW],
    )  # fmt: skip


def constants(head_dim: int, work: Work = WORK) -> dict[str, int]:
    """The kernel's compile-time arguments."""
    return {
        "D": head_dim,
        "KEYS": work.step,
        "STAGES": work.stages,
        "MANY": work.consumer_registers,
        "FEW": work.producer_registers,
    }


def dq_partials(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    dout_THD: Tensor,
    sums: RowSums,
    part: Tensor,
    list_lse: Tensor,
    list_delta: Tensor,
    lists: Lists,
    tiles: TileTable,
    table: BlockTable,
    first_token: int,
    scale_log2: float,
    work: Work = WORK,
) -> None:
    """As `triton_dq.dq_partials`; `tiles` of 128 rows, block_size a multiple of `work.step`."""
    slots = lists.group * lists.slots
    _dq_kernel[(min(common.programs(q_THD.device), tiles.bound),)](
        q_THD,
        dout_THD,
        common.token_rows(k_THD, work.step),
        common.token_rows(v_THD, work.step),
        sums.lse_TH,
        sums.delta_TH,
        part,
        lists.row,
        lists.pair,
        list_lse,
        list_delta,
        tiles.tile,
        tiles.num_tiles,
        table.block_start,
        scale_log2,
        table.block_size,
        lists.num_lists,
        lists.first_head,
        first_token * slots,
        part.shape[1] * slots,
        **constants(q_THD.shape[-1], work),
        num_warps=4,
        maxnreg=work.max_registers,
    )
