# mypy: disable-error-code="no-untyped-def"
"""`triton_routed._routed_kernel` with specialised warps, for Hopper. Same arguments, same results within rounding.

While a consumer computes the softmax of one step, the product of the step before with the values and, on the
other consumer, everything else are under way (FlashAttention-3, Shah et al. 2024, sections 3.1, 3.2).

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

WORK = Work(step=128, stages=2, consumer_registers=232, producer_registers=40)
_GATHER_WARPS = 2
_ROW_BUFFERS = 2


@gluon.jit
def _gather(
    q_ptr, q_buf, to_buf, q_full, q_empty, row_ptr, pair_ptr, tile_ptr, num_tiles, num_lists, pair_base,
    pairs_per_head, D: gl.constexpr, BUFFERS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Query rows of the tiles, a tile ahead, and where their results go."""
    LAY: gl.constexpr = common.row_layout(D, WARPS)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    num = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        slot = num % BUFFERS * 2
        phase = ((num // BUFFERS) & 1) ^ 1
        _, _, row_0, to_0 = pairs.half_tile(
            tile_ptr, tile, row_ptr, pair_ptr, num_lists, pair_base, pairs_per_head, 0, LINE
        )
        _, _, row_1, to_1 = pairs.half_tile(
            tile_ptr, tile, row_ptr, pair_ptr, num_lists, pair_base, pairs_per_head, 1, LINE
        )
        row = gl.convert_layout(row_0, gl.SliceLayout(1, LAY))
        mbarrier.wait(q_empty.index(slot), phase)
        common.copy_rows(q_ptr, row, q_buf.index(slot), D, LAY)
        async_copy.commit_group()
        to_buf.index(slot).store(to_0)
        row = gl.convert_layout(row_1, gl.SliceLayout(1, LAY))
        mbarrier.wait(q_empty.index(slot + 1), phase)
        common.copy_rows(q_ptr, row, q_buf.index(slot + 1), D, LAY)
        async_copy.commit_group()
        to_buf.index(slot + 1).store(to_1)
        common.announce(q_full.index(slot), 1)
        common.announce(q_full.index(slot + 1), 0)
        num += 1  # noqa: SIM113 - kernels know no enumerate


@gluon.jit
def _finish(
    out, top, total, buf, to_buf, empty, part_ptr, lse_ptr, D: gl.constexpr, SCORE: gl.constexpr,
    OUT: gl.constexpr,
):  # fmt: skip
    """Stores a tile's results, through its rows, which nothing reads any more, and releases those."""
    to = to_buf.load(gl.SliceLayout(1, SCORE))
    gl.store(lse_ptr + to, top + gl.log2(total), mask=to >= 0)
    out = out * gl.convert_layout(1.0 / total, gl.SliceLayout(1, OUT))[:, None]
    common.store_rows(out.to(buf.dtype), buf, to_buf, part_ptr, D)
    fence_async_shared()
    common.release(empty)


@gluon.jit
def _attend(
    q_buf, k_buf, v_buf, to_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty, part_ptr, lse_ptr, num_tiles,
    scale_log2, block_size, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 rows of every tile. One loop over the steps of all tiles: the first score and softmax of a
    tile run under the last product of the tile before.
    """
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    dtype: gl.constexpr = k_buf.dtype
    zero = gl.zeros([64, KEYS], gl.float32, SCORE)
    per_tile = block_size // KEYS
    stride = gl.num_programs(0)
    steps = (num_tiles - gl.program_id(0) + stride - 1) // stride * per_tile
    if steps > 0:
        top = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, SCORE))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORE))
        out = gl.zeros([64, D], gl.float32, OUT)
        mbarrier.wait(q_full.index(HALF), 0)
        mbarrier.wait(k_full.index(0), 0)
        q = q_buf.index(HALF)
        score = warpgroup_mma(q, k_buf.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[score])
        common.release(k_empty.index(0))
        p, decay, top, total = common.softmax(s, top, total, scale_log2)
        left = gl.convert_layout(p.to(dtype), LEFT)
        mbarrier.wait(v_full.index(0), 0)
        num = 0
        j = 0
        for step in range(1, steps):
            before = (step - 1) % STAGES
            slot = step % STAGES
            phase = (step // STAGES) & 1
            j += 1
            ended = j == per_tile  # the step before was the last of its tile
            if ended:
                j = 0
                num += 1
            rows = num % BUFFERS * 2 + HALF
            mbarrier.wait(q_full.index(rows), (num // BUFFERS) & 1, pred=ended)
            mbarrier.wait(k_full.index(slot), phase)
            q = q_buf.index(rows)
            score = warpgroup_mma(q, k_buf.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            product = warpgroup_mma(left, v_buf.index(before), out, is_async=True)
            s = warpgroup_mma_wait(1, deps=[score])
            common.release(k_empty.index(slot))
            old_top = top
            old_total = total
            top = gl.where(ended, -1.0e30, top)  # which makes nothing of the sum before
            p, decay, top, total = common.softmax(s, top, total, scale_log2)
            following = gl.convert_layout(p.to(dtype), LEFT)
            # Waiting here for the values ends a basic block: ptxas moves the softmax behind the wait otherwise.
            mbarrier.wait(v_full.index(slot), phase)
            out, left, following, total = warpgroup_mma_wait(0, deps=[product, left, following, total])
            common.release(v_empty.index(before))
            if ended:
                done = (num - 1) % BUFFERS * 2 + HALF
                _finish(out, old_top, old_total, q_buf.index(done), to_buf.index(done), q_empty.index(done),
                        part_ptr, lse_ptr, D, SCORE, OUT)  # fmt: skip
                out = gl.zeros([64, D], gl.float32, OUT)
            else:
                out = out * gl.convert_layout(decay, gl.SliceLayout(1, OUT))[:, None]
            left = following
        slot = (steps - 1) % STAGES
        product = warpgroup_mma(left, v_buf.index(slot), out, is_async=True)
        out, left = warpgroup_mma_wait(0, deps=[product, left])
        common.release(v_empty.index(slot))
        done = num % BUFFERS * 2 + HALF
        _finish(out, top, total, q_buf.index(done), to_buf.index(done), q_empty.index(done), part_ptr, lse_ptr, D,
                SCORE, OUT)  # fmt: skip


@gluon.jit(do_not_specialize=["num_lists", "first_head", "pair_base", "pairs_per_head"])
def _routed_kernel(
    q_ptr, k_desc, v_desc, part_ptr, lse_ptr, row_ptr, pair_ptr, tile_ptr, num_tiles_ptr, block_start_ptr,
    scale_log2, block_size, num_lists, first_head, pair_base, pairs_per_head, D: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, BUFFERS: gl.constexpr, WARPS: gl.constexpr, MANY: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """Program = every num_programs-th tile of up to 128 pairs of one block; block_size % KEYS == 0."""
    dtype: gl.constexpr = k_desc.dtype
    q_buf = gl.allocate_shared_memory(dtype, [2 * BUFFERS, 64, D], k_desc.layout)
    k_buf = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], k_desc.layout)
    to_buf = gl.allocate_shared_memory(gl.int32, [2 * BUFFERS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = common.barriers(2 * BUFFERS, 1)
    q_empty = common.barriers(2 * BUFFERS, 1)
    k_full = common.barriers(STAGES, 1)
    k_empty = common.barriers(STAGES, 2)
    v_full = common.barriers(STAGES, 1)
    v_empty = common.barriers(STAGES, 2)
    fence_async_shared()
    common.thread_barrier()
    num_tiles = gl.load(num_tiles_ptr)
    gl.warp_specialize(
        [
            (_attend, (q_buf, k_buf, v_buf, to_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty, part_ptr,
                       lse_ptr, num_tiles, scale_log2, block_size, D, KEYS, STAGES, BUFFERS, 0)),
            (_attend, (q_buf, k_buf, v_buf, to_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty, part_ptr,
                       lse_ptr, num_tiles, scale_log2, block_size, D, KEYS, STAGES, BUFFERS, 1)),
            (_gather, (q_ptr, q_buf, to_buf, q_full, q_empty, row_ptr, pair_ptr, tile_ptr, num_tiles, num_lists,
                       pair_base, pairs_per_head, D, BUFFERS, WARPS)),
            (common.kv_producer, (k_desc, v_desc, k_buf, v_buf, k_full, k_empty, v_full, v_empty, tile_ptr,
                                  num_tiles, block_start_ptr, block_size, num_lists, first_head, D, KEYS, STAGES)),
        ],
        [4, WARPS, 1],
        [MANY, FEW, FEW],
    )  # fmt: skip


def constants(head_dim: int, work: Work = WORK) -> dict[str, int]:
    """The kernel's compile-time arguments."""
    return {
        "D": head_dim,
        "KEYS": work.step,
        "STAGES": work.stages,
        "BUFFERS": _ROW_BUFFERS,
        "WARPS": _GATHER_WARPS,
        "MANY": work.consumer_registers,
        "FEW": work.producer_registers,
    }


def routed(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    part: Tensor,
    part_lse: Tensor,
    lists: Lists,
    tiles: TileTable,
    table: BlockTable,
    first_token: int,
    scale_log2: float,
    work: Work = WORK,
) -> None:
    """As `triton_routed.routed`; `tiles` of 128 rows, block_size a multiple of `work.step`."""
    slots = lists.group * lists.slots
    _routed_kernel[(min(common.programs(q_THD.device), tiles.bound),)](
        q_THD,
        common.token_rows(k_THD, work.step),
        common.token_rows(v_THD, work.step),
        part,
        part_lse,
        lists.row,
        lists.pair,
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
