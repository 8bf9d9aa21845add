# mypy: disable-error-code="no-untyped-def"
"""`triton_merge._merge_kernel` with specialised warps, for Hopper. Same arguments and results.

Shape legend: triton_common.py; who does what: gluon_common.py, gluon_own.py.
"""

from __future__ import annotations

from torch import Tensor
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
from model.moba import gluon_own as own
from model.moba import gluon_slots as slots
from model.moba.gluon_common import HALF_ROWS, TILE_ROWS, Work
from model.moba.triton_common import LOG2E, ceil_div
from model.moba.triton_reach import Reach
from model.moba.triton_sums import RowSums

WORK = Work(step=128, stages=5, consumer_registers=240, producer_registers=24)


@gluon.jit
def _sums(lse_ptr, delta_ptr, token, num_tokens, row_in_token, H):
    """lse and delta of the consumer's rows."""
    live = token < num_tokens
    row = token.to(gl.int64) * H + row_in_token
    lse = gl.load(lse_ptr + row, mask=live, other=float("inf"))
    return lse, gl.load(delta_ptr + row, mask=live, other=0.0)


@gluon.jit
def _own_block(
    q, dout, ring, full, empty, n, begin, last, plain_end, first_row, depth, lse, delta, scale_log2,
    D: gl.constexpr, KEYS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """dq / softmax_scale [64, D] of one consumer's rows from the keys begin .. last."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    zero = gl.zeros([64, KEYS], gl.float32, SCORE)
    dq = gl.zeros([64, D], gl.float32, OUT)
    for j in range(begin, last + 1, KEYS):
        k_at = n % SLOTS
        mbarrier.wait(full.index(k_at), (n // SLOTS) & 1)
        score = warpgroup_mma(q, ring.index(k_at).permute((1, 0)), zero, use_acc=False, is_async=True)
        n += 1
        v_at = n % SLOTS
        mbarrier.wait(full.index(v_at), (n // SLOTS) & 1)
        dp = warpgroup_mma(dout, ring.index(v_at).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[score])
        s = own.mask(s, first_row, depth, j, j >= plain_end, KEYS, SCORE)
        p = gl.exp2(s * scale_log2 - lse[:, None])
        # Over at once, but it ends a basic block: ptxas moves the exponentials behind the wait otherwise.
        mbarrier.wait(full.index(v_at), (n // SLOTS) & 1)
        dp, p = warpgroup_mma_wait(0, deps=[dp, p])
        common.release(empty.index(v_at))
        left = gl.convert_layout((p * (dp - delta[:, None])).to(ring.dtype), LEFT)
        product = warpgroup_mma(left, ring.index(k_at), dq, is_async=True)
        dq, left = warpgroup_mma_wait(0, deps=[product, left])
        common.release(empty.index(k_at))
        n += 1
    return dq, n


@gluon.jit
def _gradient(
    q_buf, dout_buf, ring, q_full, q_empty, full, empty, lse_ptr, delta_ptr, ids_ptr, start_ptr, dq_desc,
    scale_log2, softmax_scale, num_tiles, num_tokens, H, first_head, num_heads, first_token, K, shift,
    G: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, SLOTS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 tokens of every tile."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    META: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    META_ROW: gl.constexpr = gl.SliceLayout(1, META)
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    rows = HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORE))
    meta_rows = HALF * 64 + gl.arange(0, 64, META_ROW)
    num = 0
    n = 0
    head, g, first = own.place_of(gl.program_id(0), num_tiles, first_head, num_heads, first_token, shift, G)
    low, high, start = own.runs(start_ptr, first, rows, num_tokens)
    lse, delta = _sums(lse_ptr, delta_ptr, first + rows, num_tokens, head * G + g, H)
    ids = slots.block_ids(ids_ptr, first + meta_rows, num_tokens, head * G + g, H, 0, K, META)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        begin, last, plain_end = own.span(low, high, first, num_tokens, KEYS)
        past = (gl.convert_layout(start, META_ROW) >= 0)[:, None]
        bits = slots.used_bits(ids, past, META, ROW)
        if num > 0:
            own.release_stored(empty.index((n - 1) % SLOTS))
        mbarrier.wait(q_full.index(0), num & 1)
        dq, n = _own_block(
            q_buf.index(HALF), dout_buf.index(HALF), ring, full, empty, n, begin, last, plain_end,
            first + HALF * 64, first + rows - own.first_key(start), lse, delta, scale_log2, D, KEYS, SLOTS,
        )  # fmt: skip
        common.release(q_empty.index(0))
        # What the next tile needs to know: there by the time it begins.
        after = gl.minimum(tile + gl.num_programs(0), num_tiles - 1)
        head_1, g_1, first_1 = own.place_of(after, num_tiles, first_head, num_heads, first_token, shift, G)
        low, high, start = own.runs(start_ptr, first_1, rows, num_tokens)
        lse, delta = _sums(lse_ptr, delta_ptr, first_1 + rows, num_tokens, head_1 * G + g_1, H)
        ids = slots.block_ids(ids_ptr, first_1 + meta_rows, num_tokens, head_1 * G + g_1, H, 0, K, META)
        for base in range(0, K, 8):
            more = slots.block_ids(ids_ptr, first + meta_rows, num_tokens, head * G + g, H, base + 8, K, META)
            dq, n = slots.add(bits, dq, ring, full, empty, n, base, K, SLOTS, HALF, OUT)
            bits = slots.used_bits(more, past, META, ROW)
        last_slot = ring.index((n - 1) % SLOTS).slice(HALF * 64, 64)
        column = (head * G + g) * D
        own.store_rows(dq * softmax_scale, last_slot, dq_desc, first + HALF * 64, column, ring.dtype)
        num += 1  # noqa: SIM113 - kernels know no enumerate
        head = head_1
        g = g_1
        first = first_1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=own.VARYING)
def _merge_kernel(
    q_desc, dout_desc, k_desc, v_desc, part_desc, dq_desc, lse_ptr, delta_ptr, ids_ptr, start_ptr, scale_log2,
    softmax_scale, num_tiles, num_tokens, H, first_head, num_heads, first_token, tokens_per_head, K, shift,
    G: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, SLOTS: gl.constexpr, MANY: gl.constexpr,
    FEW: gl.constexpr,
):  # fmt: skip
    """Program = every num_programs-th tile of 128 tokens of one query head."""
    q_buf = gl.allocate_shared_memory(k_desc.dtype, [2, 64, D], k_desc.layout)
    dout_buf = gl.allocate_shared_memory(k_desc.dtype, [2, 64, D], k_desc.layout)
    ring = gl.allocate_shared_memory(k_desc.dtype, [SLOTS, KEYS, D], k_desc.layout)
    q_full = common.barriers(1, 1)
    q_empty = common.barriers(1, 2)
    full = common.barriers(SLOTS, 1)
    empty = common.barriers(SLOTS, 2)
    fence_async_shared()
    common.thread_barrier()
    gl.warp_specialize(
        [
            (_gradient, (q_buf, dout_buf, ring, q_full, q_empty, full, empty, lse_ptr, delta_ptr, ids_ptr,
                         start_ptr, dq_desc, scale_log2, softmax_scale, num_tiles, num_tokens, H, first_head,
                         num_heads, first_token, K, shift, G, D, KEYS, SLOTS, 0)),
            (_gradient, (q_buf, dout_buf, ring, q_full, q_empty, full, empty, lse_ptr, delta_ptr, ids_ptr,
                         start_ptr, dq_desc, scale_log2, softmax_scale, num_tiles, num_tokens, H, first_head,
                         num_heads, first_token, K, shift, G, D, KEYS, SLOTS, 1)),
            (own.stream, (q_desc, dout_desc, k_desc, v_desc, part_desc, q_buf, dout_buf, ring, q_full, q_empty,
                          full, empty, start_ptr, num_tiles, num_tokens, first_head, num_heads, first_token,
                          tokens_per_head, K, shift, G, D, KEYS, SLOTS, True)),
        ],
        [4, 1],
        [MANY, FEW],
    )  # fmt: skip


def constants(head_dim: int, group: int, work: Work = WORK) -> dict[str, int]:
    """The kernel's compile-time arguments."""
    return {
        "G": group,
        "D": head_dim,
        "KEYS": work.step,
        "SLOTS": work.stages * 128 // head_dim,  # of half the size, twice as many
        "MANY": work.consumer_registers,
        "FEW": work.producer_registers,
    }


def merge_dq(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    dout_THD: Tensor,
    sums: RowSums,
    part: Tensor,
    block_ids: Tensor,
    reach: Reach,
    dq_THD: Tensor,
    heads: range,
    tokens: range,
    softmax_scale: float,
    block_size: int,
    work: Work = WORK,
) -> None:
    """As `triton_merge.merge_dq` with partials, K >= 1; part [heads, tokens, G * K, D] without gaps.

    block_size sets the order of the tiles, nothing else.
    """
    H, D = q_THD.shape[1:]
    G = H // k_THD.shape[1]
    K = block_ids.shape[-1]
    assert tokens.stop == q_THD.shape[0] or len(tokens) % TILE_ROWS == 0, "tiles are stored whole"
    num_tiles = ceil_div(len(tokens), TILE_ROWS) * len(heads) * G
    programs = min(common.programs(q_THD.device), num_tiles)
    _merge_kernel[(programs,)](
        common.token_rows(q_THD, HALF_ROWS),
        common.token_rows(dout_THD, HALF_ROWS),
        common.token_rows(k_THD, work.step),
        common.token_rows(v_THD, work.step),
        common.token_rows(part.reshape(-1, G * K, D), TILE_ROWS),
        common.token_rows(dq_THD, HALF_ROWS),
        sums.lse_TH,
        sums.delta_TH,
        block_ids,
        reach.start,
        softmax_scale * LOG2E,
        softmax_scale,
        num_tiles,
        tokens.stop,
        H,
        heads.start,
        len(heads),
        tokens.start,
        len(tokens),
        K,
        own.turned(num_tiles, programs, len(heads) * G, block_size),
        **constants(D, G, work),
        num_warps=4,
        maxnreg=work.max_registers,
    )
