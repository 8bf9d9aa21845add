# mypy: disable-error-code="no-untyped-def"
"""`triton_combine._combine_kernel` with specialised warps, for Hopper. Same arguments; results within rounding.

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
from model.moba.triton_common import ceil_div
from model.moba.triton_reach import Reach

WORK = Work(step=128, stages=6, consumer_registers=240, producer_registers=24)


@gluon.jit
def _own_block(
    q, ring, full, empty, q_empty, n, begin, last, plain_end, first_row, depth, scale_log2, pending,
    D: gl.constexpr, KEYS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One consumer's rows against the keys begin .. last; gives q back. pending: are rows still being stored?"""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    dtype: gl.constexpr = ring.dtype
    zero = gl.zeros([64, KEYS], gl.float32, SCORE)
    top = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, SCORE))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORE))
    out = gl.zeros([64, D], gl.float32, OUT)
    mbarrier.wait(full.index(n % SLOTS), (n // SLOTS) & 1)
    score = warpgroup_mma(q, ring.index(n % SLOTS).permute((1, 0)), zero, use_acc=False, is_async=True)
    if pending:
        own.release_stored(empty.index((n - 1) % SLOTS))
    s = warpgroup_mma_wait(0, deps=[score])
    common.release(empty.index(n % SLOTS))
    s = own.mask(s, first_row, depth, begin, begin >= plain_end, KEYS, SCORE)
    p, decay, top, total = common.softmax(s, top, total, scale_log2)
    left = gl.convert_layout(p.to(dtype), LEFT)
    n += 1
    mbarrier.wait(full.index(n % SLOTS), (n // SLOTS) & 1)
    for j in range(begin + KEYS, last + 1, KEYS):
        v_at = n % SLOTS
        n += 1
        k_at = n % SLOTS
        mbarrier.wait(full.index(k_at), (n // SLOTS) & 1)
        score = warpgroup_mma(q, ring.index(k_at).permute((1, 0)), zero, use_acc=False, is_async=True)
        product = warpgroup_mma(left, ring.index(v_at), out, is_async=True)
        s = warpgroup_mma_wait(1, deps=[score])
        common.release(empty.index(k_at))
        s = own.mask(s, first_row, depth, j, j >= plain_end, KEYS, SCORE)
        p, decay, top, total = common.softmax(s, top, total, scale_log2)
        following = gl.convert_layout(p.to(dtype), LEFT)
        # Waiting here for the values ends a basic block: ptxas moves the softmax behind the wait otherwise.
        n += 1
        mbarrier.wait(full.index(n % SLOTS), (n // SLOTS) & 1)
        out, left, following, total = warpgroup_mma_wait(0, deps=[product, left, following, total])
        common.release(empty.index(v_at))
        out = out * gl.convert_layout(decay, ROW)[:, None]
        left = following
    product = warpgroup_mma(left, ring.index(n % SLOTS), out, is_async=True)
    common.release(q_empty)
    out, left = warpgroup_mma_wait(0, deps=[product, left])
    common.release(empty.index(n % SLOTS))
    return gl.convert_layout(top, ROW), gl.convert_layout(total, ROW), out, n + 1


@gluon.jit
def _attend(
    q_buf, ring, q_full, q_empty, full, empty, part_lse_ptr, ids_ptr, start_ptr, out_desc, lse_ptr, scale_log2,
    num_tiles, num_tokens, H, first_head, num_heads, first_token, tokens_per_head, K, shift, G: gl.constexpr,
    D: gl.constexpr, KEYS: gl.constexpr, SLOTS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 tokens of every tile."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    META: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    META_ROW: gl.constexpr = gl.SliceLayout(1, META)
    rows = HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORE))
    meta_rows = HALF * 64 + gl.arange(0, 64, META_ROW)
    num = 0
    n = 0
    head, g, first = own.place_of(gl.program_id(0), num_tiles, first_head, num_heads, first_token, shift, G)
    low, high, start = own.runs(start_ptr, first, rows, num_tokens)
    ids, lses = slots.ids_and_lse(
        ids_ptr, part_lse_ptr, first + meta_rows, num_tokens, head, g, H, first_head, first_token, tokens_per_head,
        0, K, G, META,
    )  # fmt: skip
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        begin, last, plain_end = own.span(low, high, first, num_tokens, KEYS)
        past = (gl.convert_layout(start, META_ROW) >= 0)[:, None]
        lses = gl.where((ids >= 0) & past, lses, float("-inf"))
        mbarrier.wait(q_full.index(0), num & 1)
        top, total, out, n = _own_block(
            q_buf.index(HALF), ring, full, empty, q_empty.index(0), n, begin, last, plain_end,
            first + HALF * 64, first + rows - own.first_key(start), scale_log2, num > 0, D, KEYS, SLOTS,
        )  # fmt: skip
        # What the next tile needs to know: there by the time it begins.
        after = gl.minimum(tile + gl.num_programs(0), num_tiles - 1)
        head_1, g_1, first_1 = own.place_of(after, num_tiles, first_head, num_heads, first_token, shift, G)
        low, high, start = own.runs(start_ptr, first_1, rows, num_tokens)
        ids, lses_1 = slots.ids_and_lse(
            ids_ptr, part_lse_ptr, first_1 + meta_rows, num_tokens, head_1, g_1, H, first_head, first_token,
            tokens_per_head, 0, K, G, META,
        )  # fmt: skip
        for base in range(0, K, 8):
            weight, top, total, out = slots.weights(lses, top, total, out, ROW, META_ROW)
            more, lses = slots.ids_and_lse(
                ids_ptr, part_lse_ptr, first + meta_rows, num_tokens, head, g, H, first_head, first_token,
                tokens_per_head, base + 8, K, G, META,
            )  # fmt: skip
            out, n = slots.add_weighted(weight, out, ring, full, empty, n, base, K, SLOTS, HALF, META, OUT)
            lses = gl.where((more >= 0) & past, lses, float("-inf"))
        lses = lses_1
        token = first + HALF * 64 + gl.arange(0, 64, ROW)
        row = token.to(gl.int64) * H + head * G + g
        gl.store(lse_ptr + row, top + gl.log2(total), mask=token < num_tokens)
        last_slot = ring.index((n - 1) % SLOTS).slice(HALF * 64, 64)
        column = (head * G + g) * D
        own.store_rows(out * (1.0 / total)[:, None], last_slot, out_desc, first + HALF * 64, column, ring.dtype)
        num += 1  # noqa: SIM113 - kernels know no enumerate
        head = head_1
        g = g_1
        first = first_1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=own.VARYING)
def _combine_kernel(
    q_desc, k_desc, v_desc, part_desc, out_desc, part_lse_ptr, ids_ptr, start_ptr, lse_ptr, scale_log2, num_tiles,
    num_tokens, H, first_head, num_heads, first_token, tokens_per_head, K, shift, G: gl.constexpr, D: gl.constexpr,
    KEYS: gl.constexpr, SLOTS: gl.constexpr, MANY: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """Program = every num_programs-th tile of 128 tokens of one query head."""
    q_buf = gl.allocate_shared_memory(k_desc.dtype, [2, 64, D], k_desc.layout)
    ring = gl.allocate_shared_memory(k_desc.dtype, [SLOTS, KEYS, D], k_desc.layout)
    q_full = common.barriers(1, 1)
    q_empty = common.barriers(1, 2)
    full = common.barriers(SLOTS, 1)
    empty = common.barriers(SLOTS, 2)
    fence_async_shared()
    common.thread_barrier()
    gl.warp_specialize(
        [
            (_attend, (q_buf, ring, q_full, q_empty, full, empty, part_lse_ptr, ids_ptr, start_ptr, out_desc,
                       lse_ptr, scale_log2, num_tiles, num_tokens, H, first_head, num_heads, first_token,
                       tokens_per_head, K, shift, G, D, KEYS, SLOTS, 0)),
            (_attend, (q_buf, ring, q_full, q_empty, full, empty, part_lse_ptr, ids_ptr, start_ptr, out_desc,
                       lse_ptr, scale_log2, num_tiles, num_tokens, H, first_head, num_heads, first_token,
                       tokens_per_head, K, shift, G, D, KEYS, SLOTS, 1)),
            (own.stream, (q_desc, q_desc, k_desc, v_desc, part_desc, q_buf, q_buf, ring, q_full, q_empty, full,
                          empty, start_ptr, num_tiles, num_tokens, first_head, num_heads, first_token,
                          tokens_per_head, K, shift, G, D, KEYS, SLOTS, False)),
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


def combine(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    part: Tensor,
    part_lse: Tensor,
    block_ids: Tensor,
    reach: Reach,
    out_THD: Tensor,
    lse_TH: Tensor,
    heads: range,
    tokens: range,
    scale_log2: float,
    block_size: int,
    work: Work = WORK,
) -> None:
    """As `triton_combine.combine` with partials, K >= 1; part [heads, tokens, G * K, D] without gaps.

    block_size sets the order of the tiles, nothing else.
    """
    H, D = q_THD.shape[1:]
    G, K = H // k_THD.shape[1], block_ids.shape[-1]
    assert tokens.stop == q_THD.shape[0] or len(tokens) % TILE_ROWS == 0, "tiles are stored whole"
    num_tiles = ceil_div(len(tokens), TILE_ROWS) * len(heads) * G
    programs = min(common.programs(q_THD.device), num_tiles)
    _combine_kernel[(programs,)](
        common.token_rows(q_THD, HALF_ROWS),
        common.token_rows(k_THD, work.step),
        common.token_rows(v_THD, work.step),
        common.token_rows(part.reshape(-1, G * K, D), TILE_ROWS),
        common.token_rows(out_THD, HALF_ROWS),
        part_lse,
        block_ids,
        reach.start,
        lse_TH,
        scale_log2,
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
