# mypy: disable-error-code="no-untyped-def"
"""What the warp-specialised kernels for Hopper share: layouts, the producers' loops, shapes of the work.

A program is groups of warps that talk through mbarriers in shared memory: two consumers, each a warpgroup of
64 rows (or keys) with nearly all registers, whose softmax runs while the other's matrix instructions do
(FlashAttention-3, Shah et al. 2024, section 3.1), one or two groups that gather rows by cp.async, and one warp
that streams keys and values by TMA. Hopper's TMA cannot gather rows.

An mbarrier `full` is completed by the producer of a buffer, `empty` by its consumers; the wait for use n of a
buffer is for phase n % 2, and `empty` starts as if phase 1 were complete.

Shape legend: triton_common.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HALF_ROWS = 64  # of one consumer: the rows of a warpgroup's matrix instruction
TILE_ROWS = 2 * HALF_ROWS
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # renamed in Triton 3.7


@dataclass(frozen=True)
class Work:
    """Shape of one kernel: keys per step (or rows, where rows stream), buffers, and registers per thread.

    Registers of all warps together are the launch's (`max_registers` x 384 threads); they are dealt out again
    when the groups part.
    """

    step: int
    stages: int
    consumer_registers: int
    producer_registers: int
    max_registers: int = 168


@gluon.jit
def kv_producer(
    k_desc, v_desc, k_buf, v_buf, k_full, k_empty, v_full, v_empty, tile_ptr, num_tiles, block_start_ptr,
    block_size, num_lists, first_head, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: keys and values of the blocks of this program's tiles, KEYS at a time.

    Which list a tile is of is loaded two tiles ahead, where its block starts one tile ahead.
    """
    step = 0
    first = gl.program_id(0)
    stride = gl.num_programs(0)
    lists = gl.load(tile_ptr + first * 4, mask=first < num_tiles, other=0)
    head = lists // num_lists
    start = gl.load(block_start_ptr + lists - head * num_lists)
    lists = gl.load(tile_ptr + (first + stride) * 4, mask=first + stride < num_tiles, other=0)
    for tile in range(first, num_tiles, stride):
        column = (first_head + head) * D
        head = lists // num_lists
        next_start = gl.load(block_start_ptr + lists - head * num_lists)
        after = tile + 2 * stride
        lists = gl.load(tile_ptr + after * 4, mask=after < num_tiles, other=0)
        for j in range(0, block_size, KEYS):
            slot = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [start + j, column], k_full.index(slot), k_buf.index(slot))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [start + j, column], v_full.index(slot), v_buf.index(slot))
            step += 1
        start = next_start


@gluon.constexpr_function
def row_layout(dim, warps):
    """Layout of half-precision rows [rows, dim] in 16-byte pieces, neighbouring threads along a row."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [warps, 1], [1, 0])


@gluon.jit
def copy_rows(x_ptr, row, buf, D: gl.constexpr, LAY: gl.constexpr):
    """Starts copies of 64 gathered rows into a buffer [64, D]; `row` [64] is a slice of the layout LAY."""
    at = row.to(gl.int64) * D
    async_copy.async_copy_global_to_shared(
        buf, x_ptr + at[:, None] + gl.arange(0, D, gl.SliceLayout(0, LAY))[None, :]
    )


@gluon.jit
def announce(bar, pending: gl.constexpr):
    """Completes `bar` once all but the latest `pending` groups of copies have arrived."""
    async_copy.wait_group(pending)
    fence_async_shared()  # matrix instructions read what cp.async wrote
    thread_barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def release(bar):
    """One consumer is done with a buffer: all its warps are."""
    thread_barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """NUM mbarriers, each completed by COUNT arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def softmax(s, top, total, scale_log2):
    """Running maximum and sum of a row after the scores s; p, and what earlier sums shrink by."""
    new_top = gl.maximum(top, gl.max(s, 1) * scale_log2)
    p = gl.exp2(s * scale_log2 - new_top[:, None])
    decay = gl.exp2(top - new_top)
    return p, decay, new_top, total * decay + gl.sum(p, 1)


@gluon.jit
def store_rows(x, buf, to_buf, part_ptr, D: gl.constexpr):
    """Rows x [64, D] of one consumer to the rows of `part` named in to_buf, through `buf` for whole sectors."""
    lay: gl.constexpr = row_layout(D, 4)
    buf.store(x)
    to = to_buf.load(gl.SliceLayout(1, lay))
    thread_barrier()
    at = to.to(gl.int64)[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, lay))[None, :]
    gl.store(part_ptr + at, buf.load(lay), mask=(to >= 0)[:, None])


def shared_layout(dtype: torch.dtype, rows: int, dim: int) -> Any:
    return gl.NVMMASharedLayout.get_default_for(
        [rows, dim], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    )


def token_rows(x_THD: Tensor, rows: int) -> Any:
    """Descriptor of [rows, D] tiles of `x_THD` seen as [T, H * D]."""
    T, H, D = x_THD.shape
    layout = shared_layout(x_THD.dtype, rows, D)
    return TensorDescriptor(x_THD, [T, H * D], [H * D, 1], [rows, D], layout)


def programs(device: torch.device) -> int:
    """Programs of a kernel that walks its tiles: one per multiprocessor."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
