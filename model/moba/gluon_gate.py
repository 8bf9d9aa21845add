# mypy: disable-error-code="no-untyped-def"
"""`triton_gate._gate_kernel` with specialised warps, for Hopper and many blocks: the same blocks, bit for bit.

The twin compares every score with the worst of its row's list, in rounds of which a tile needs as many as its
unluckiest row. Here scores fall into streams (`gluon_streams`) that never look at other threads, and the list is
made from those once in 64 * S blocks. A row that may have lost one of its best on the way, one of some thousands,
is chosen for again (`triton_again`).

What bounds it then is where block means come from: one warp streams them by TMA for three consumers, each a
warpgroup with 64 rows of its own, whose products run while others sort.

Shape legend: triton_common.py; who does what: gluon_common.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from model.moba import gluon_common as common
from model.moba import gluon_gate_steps as steps
from model.moba import gluon_streams as streams
from model.moba import triton_again, triton_common
from model.moba.blocks import BlockTable

COLS = 64  # blocks per step


@dataclass(frozen=True)
class Shape:
    """Shape of one kernel: streams of a row, steps of means under way, registers per thread."""

    streams: int
    lost: float  # share of rows that may lose one of their best
    stages: int
    consumer_registers: int
    producer_registers: int
    max_registers: int


SHAPE = Shape(streams=16, lost=1e-2, stages=3, consumer_registers=160, producer_registers=32, max_registers=128)


@gluon.jit
def _choose(
    q_buf, mean_buf, full, empty, q_ptr, own_ptr, first_ptr, ids_ptr, again_ptr, count_ptr, num_tokens,
    num_kv_heads, num_tiles, K, capacity, TILE: gl.constexpr, PART: gl.constexpr, G: gl.constexpr,
    GROUP: gl.constexpr, D: gl.constexpr, COLS: gl.constexpr, S: gl.constexpr, DEPTH: gl.constexpr,
    SLOTS: gl.constexpr, STAGES: gl.constexpr, MANY: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 rows of every tile."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    FLAT: gl.constexpr = streams.first_group(gl.zeros([64, COLS], gl.float32, SCORE), COLS, S).type.layout
    LIST: gl.constexpr = streams.list_layout(SLOTS)
    r = gl.arange(0, 64, gl.SliceLayout(1, LIST))
    place = gl.arange(0, SLOTS, gl.SliceLayout(0, LIST))
    steps.copy_queries(q_ptr, q_buf.index(PART), gl.program_id(0), num_tokens, num_kv_heads, num_tiles, TILE, PART,
                       G, GROUP, D)  # fmt: skip
    step = 0
    for number in range(gl.program_id(0), num_tiles * num_kv_heads, gl.num_programs(0)):
        head, start, begin, end, plain_end, covered = steps.tile(
            own_ptr, first_ptr, number, num_tokens, num_kv_heads, num_tiles, K, TILE, COLS
        )
        token = start + PART * (64 // GROUP) + r // GROUP
        live = (token < num_tokens) & (r % GROUP < G)
        best, ids = streams.empty_list(K, SLOTS)
        lost = gl.zeros([64], gl.int32, gl.SliceLayout(1, FLAT))
        async_copy.wait_group(0)
        common.thread_barrier()
        # Products take them from registers: the next tile's may arrive meanwhile.
        q = q_buf.index(PART).load(gl.DotOperandLayout(0, SCORE, 2))
        common.thread_barrier()
        steps.copy_queries(q_ptr, q_buf.index(PART), number + gl.num_programs(0), num_tokens, num_kv_heads,
                           num_tiles, TILE, PART, G, GROUP, D)  # fmt: skip
        for first in range(begin, end, 64 * S):
            stop = gl.minimum(first + 64 * S, end)
            middle = gl.maximum(first, gl.minimum(plain_end, stop))
            levels, step = steps.fill(
                streams.empty(S, DEPTH, FLAT), q, mean_buf, full, empty, own_ptr, first_ptr, token,
                num_tokens, first, middle, stop, step, COLS, S, DEPTH, 64, STAGES,
            )  # fmt: skip
            best, ids, some = streams.drain(levels, first, best, ids, K, first == begin, S, DEPTH, 64, MANY, EXACT)
            lost |= some
        if covered:
            past = gl.load(own_ptr + token, mask=live, other=0) - begin
            ids = gl.where(place[None, :] < past[:, None], begin + place[None, :], ids)
        row = (token * num_kv_heads + head) * G + r % GROUP
        out = ids_ptr + row.to(gl.int64)[:, None] * K + place[None, :]
        gl.store(out, gl.maximum(ids, -1), mask=live[:, None] & (place < K)[None, :])
        if gl.max(lost, 0) > 0:
            again = (gl.convert_layout(lost, gl.SliceLayout(1, LIST)) > 0) & live
            at = gl.atomic_add(count_ptr + head + r * 0, r * 0 + 1, mask=again, sem="relaxed")
            gl.store(again_ptr + head.to(gl.int64) * capacity + at, row, mask=again)
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "num_kv_heads", "num_tiles", "K", "capacity"])
def _gate_kernel(
    q_ptr,
    high_desc,
    low_desc,
    own_ptr,
    first_ptr,
    ids_ptr,
    again_ptr,
    count_ptr,
    num_tokens,
    num_blocks,
    num_kv_heads,
    num_tiles,
    K,
    capacity,
    G: gl.constexpr,
    GROUP: gl.constexpr,  # G rounded up to a power of two
    D: gl.constexpr,
    COLS: gl.constexpr,
    S: gl.constexpr,
    DEPTH: gl.constexpr,
    SLOTS: gl.constexpr,  # K rounded up to a power of two
    STAGES: gl.constexpr,
    MANY: gl.constexpr,
    EXACT: gl.constexpr,
    CONSUMER: gl.constexpr,
    PRODUCER: gl.constexpr,
):
    """Program = every num_programs-th tile of 3 x 64 rows: some tokens and the query heads of one key head."""
    dtype: gl.constexpr = high_desc.dtype
    TILE: gl.constexpr = 3 * (64 // GROUP)
    q_buf = gl.allocate_shared_memory(dtype, [3, 64, D], high_desc.layout)
    mean_buf = gl.allocate_shared_memory(dtype, [2 * STAGES, COLS, D], high_desc.layout)
    full = common.barriers(STAGES, 1)
    empty = common.barriers(STAGES, 3)
    fence_async_shared()
    common.thread_barrier()
    gl.warp_specialize(
        [
            (_choose, (q_buf, mean_buf, full, empty, q_ptr, own_ptr, first_ptr, ids_ptr, again_ptr,
                       count_ptr, num_tokens, num_kv_heads, num_tiles, K, capacity, TILE, 0, G, GROUP, D, COLS, S,
                       DEPTH, SLOTS, STAGES, MANY, EXACT)),
            (_choose, (q_buf, mean_buf, full, empty, q_ptr, own_ptr, first_ptr, ids_ptr, again_ptr,
                       count_ptr, num_tokens, num_kv_heads, num_tiles, K, capacity, TILE, 1, G, GROUP, D, COLS, S,
                       DEPTH, SLOTS, STAGES, MANY, EXACT)),
            (_choose, (q_buf, mean_buf, full, empty, q_ptr, own_ptr, first_ptr, ids_ptr, again_ptr,
                       count_ptr, num_tokens, num_kv_heads, num_tiles, K, capacity, TILE, 2, G, GROUP, D, COLS, S,
                       DEPTH, SLOTS, STAGES, MANY, EXACT)),
            (steps.stream_means, (high_desc, low_desc, mean_buf, full, empty, own_ptr, first_ptr, num_tokens,
                                   num_blocks, num_kv_heads, num_tiles, K, TILE, COLS, STAGES)),
        ],
        [4, 4, 1],
        [CONSUMER, CONSUMER, PRODUCER],
    )  # fmt: skip


def constants(head_dim: int, group: int, num_past: int, num_blocks: int, shape: Shape = SHAPE) -> dict[str, int]:
    """The kernel's compile-time arguments."""
    depth = streams.depth_for(num_past, shape.streams, shape.lost)
    return {
        "G": group,
        "GROUP": triton_common.next_power_of_two(group),
        "D": head_dim,
        "COLS": COLS,
        "S": shape.streams,
        "DEPTH": depth,
        "SLOTS": max(4, triton_common.next_power_of_two(num_past)),
        "STAGES": shape.stages,
        "MANY": num_blocks > COLS * shape.streams,
        "EXACT": depth >= num_past,
        "CONSUMER": shape.consumer_registers,
        "PRODUCER": shape.producer_registers,
    }


def _rows(mean: Tensor) -> Any:
    """Descriptor of [COLS, D] pieces of block means [Hkv, NB, D]."""
    D = mean.shape[-1]
    layout = common.shared_layout(mean.dtype, COLS, D)
    return TensorDescriptor(mean, [mean.numel() // D, D], [D, 1], [COLS, D], layout)


def choose(
    q_THD: Tensor, means: tuple[Tensor, Tensor], table: BlockTable, num_past: int, shape: Shape = SHAPE
) -> Tensor:
    """As `triton_gate.choose`, for what `hopper.gate_refusal` allows.

    Args:
        means: both parts of the block means, [Hkv, NB, D].
    """
    T, H, D = q_THD.shape
    Hkv, NB = means[0].shape[:2]
    G = H // Hkv
    fixed = constants(D, G, num_past, NB, shape)
    num_tiles = triton_common.ceil_div(T, 3 * (common.HALF_ROWS // fixed["GROUP"]))
    ids = torch.empty((T, H, num_past), dtype=torch.int32, device=q_THD.device)
    listed = triton_again.Listed.none(Hkv, T * G, q_THD.device)
    high, low = (_rows(x) for x in means)
    _gate_kernel[(min(common.programs(q_THD.device), num_tiles * Hkv),)](
        q_THD,
        high,
        low,
        table.own_block,
        table.first_block,
        ids,
        listed.row,
        listed.count,
        T,
        NB,
        Hkv,
        num_tiles,
        num_past,
        T * G,
        **fixed,
        num_warps=4,
        maxnreg=shape.max_registers,
    )
    triton_again.choose(q_THD, means, table, listed, ids)
    return ids
