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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from model.moba import gluon_common as common
from model.moba import gluon_own as own
from model.moba.gluon_common import HALF_ROWS, TILE_ROWS, Work
from model.moba.triton_common import ceil_div
from model.moba.triton_reach import Reach

WORK = Work(step=128, stages=2, consumer_registers=232, producer_registers=40)
_ROW_BUFFERS = 2


@gluon.jit
def _add_part(buf, used, lse, top, total, out, HALF: gl.constexpr, LAY: gl.constexpr):
    """Merges the partial results of one slot; rows without one keep what they have."""
    lse = gl.where(used, lse, float("-inf"))
    new_top = gl.maximum(top, lse)
    decay = gl.exp2(top - new_top)
    weight = gl.exp2(lse - new_top)
    part = buf.slice(HALF * 64, 64).load(LAY).to(gl.float32)
    part = gl.where(used[:, None], part, 0.0)  # empty slots may hold anything
    return new_top, total * decay + weight, out * decay[:, None] + part * weight[:, None]


@gluon.jit
def _add_parts(
    k_buf, v_buf, k_full, k_empty, v_full, v_empty, ids_ptr, lse_ptr, past, ks, vs, K, top, total, out,
    STAGES: gl.constexpr, HALF: gl.constexpr, LAY: gl.constexpr,
):  # fmt: skip
    """Merges the partial results of all slots, in their order; pointers to the rows' first slots."""
    ids = gl.load(ids_ptr, mask=past & (K > 0), other=-1)
    lse = gl.load(lse_ptr, mask=past & (K > 0), other=0.0)
    for slot in range(0, K):
        used = ids >= 0
        lse_now = lse
        more = past & (slot + 1 < K)
        ids = gl.load(ids_ptr + slot + 1, mask=more, other=-1)
        lse = gl.load(lse_ptr + slot + 1, mask=more, other=0.0)
        if slot % 2 == 0:
            at = ks % STAGES
            mbarrier.wait(k_full.index(at), (ks // STAGES) & 1)
            top, total, out = _add_part(k_buf.index(at), used, lse_now, top, total, out, HALF, LAY)
            fence_async_shared()
            common.release(k_empty.index(at))
            ks += 1
        else:
            at = vs % STAGES
            mbarrier.wait(v_full.index(at), (vs // STAGES) & 1)
            top, total, out = _add_part(v_buf.index(at), used, lse_now, top, total, out, HALF, LAY)
            fence_async_shared()
            common.release(v_empty.index(at))
            vs += 1
    return top, total, out, ks, vs


@gluon.jit
def _attend(
    q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty, part_lse_ptr, ids_ptr, start_ptr,
    out_ptr, lse_ptr, scale_log2, num_tiles, num_tokens, H, first_head, num_heads, first_token, tokens_per_head, K,
    G: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 tokens of every tile."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    dtype: gl.constexpr = k_buf.dtype
    zero = gl.zeros([64, KEYS], gl.float32, SCORE)
    num = 0
    ks, vs = 0, 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head, g, first = own.place_of(tile, first_head, num_heads, first_token, G)
        last = gl.minimum(first + 128, num_tokens) - 1
        begin = own.first_key(gl.load(start_ptr + first))
        whole = own.first_key(gl.load(start_ptr + last)) == begin
        plain_end = gl.where(whole, begin + (first - begin) // KEYS * KEYS, begin)
        first_row = first + HALF * 64
        token = first_row + gl.arange(0, 64, gl.SliceLayout(1, SCORE))
        start = gl.load(start_ptr + token, mask=token < num_tokens, other=0)
        depth = token - own.first_key(start)
        row_slot = num % BUFFERS * 2 + HALF
        q = q_buf.index(row_slot)
        top = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, SCORE))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORE))
        out = gl.zeros([64, D], gl.float32, OUT)
        k_at = ks % STAGES
        v_at = vs % STAGES
        mbarrier.wait(q_full.index(num % BUFFERS), (num // BUFFERS) & 1)
        mbarrier.wait(k_full.index(k_at), (ks // STAGES) & 1)
        score = warpgroup_mma(q, k_buf.index(k_at).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[score])
        common.release(k_empty.index(k_at))
        s = own.mask(s, first_row, depth, begin, begin >= plain_end, KEYS, SCORE)
        p, decay, top, total = common.softmax(s, top, total, scale_log2)
        left = gl.convert_layout(p.to(dtype), LEFT)
        mbarrier.wait(v_full.index(v_at), (vs // STAGES) & 1)
        for j in range(begin + KEYS, last + 1, KEYS):
            ks, vs = ks + 1, vs + 1
            k_at = ks % STAGES
            before = v_at
            v_at = vs % STAGES
            mbarrier.wait(k_full.index(k_at), (ks // STAGES) & 1)
            score = warpgroup_mma(q, k_buf.index(k_at).permute((1, 0)), zero, use_acc=False, is_async=True)
            product = warpgroup_mma(left, v_buf.index(before), out, is_async=True)
            s = warpgroup_mma_wait(1, deps=[score])
            common.release(k_empty.index(k_at))
            s = own.mask(s, first_row, depth, j, j >= plain_end, KEYS, SCORE)
            p, decay, top, total = common.softmax(s, top, total, scale_log2)
            following = gl.convert_layout(p.to(dtype), LEFT)
            # Waiting here for the values ends a basic block: ptxas moves the softmax behind the wait otherwise.
            mbarrier.wait(v_full.index(v_at), (vs // STAGES) & 1)
            out, left, following, total = warpgroup_mma_wait(0, deps=[product, left, following, total])
            common.release(v_empty.index(before))
            out = out * gl.convert_layout(decay, ROW)[:, None]
            left = following
        product = warpgroup_mma(left, v_buf.index(v_at), out, is_async=True)
        out, left = warpgroup_mma_wait(0, deps=[product, left])
        common.release(v_empty.index(v_at))
        ks, vs = ks + 1, vs + 1
        top = gl.convert_layout(top, ROW)
        total = gl.convert_layout(total, ROW)
        start = gl.convert_layout(start, ROW)
        token = first_row + gl.arange(0, 64, ROW)
        live = token < num_tokens
        past = live & (start >= 0)
        row = token.to(gl.int64) * H + head * G + g
        pair = ((head - first_head).to(gl.int64) * tokens_per_head + token - first_token) * (G * K) + g * K
        top, total, out, ks, vs = _add_parts(
            k_buf, v_buf, k_full, k_empty, v_full, v_empty, ids_ptr + row * K, part_lse_ptr + pair, past, ks, vs,
            K, top, total, out, STAGES, HALF, OUT,
        )  # fmt: skip
        gl.store(lse_ptr + row, top + gl.log2(total), mask=live)
        out, free = out * (1.0 / total)[:, None], q_empty.index(num % BUFFERS)
        own.store_tile(out, q, free, out_ptr, first_row, head * G + g, num_tokens, H, D, dtype)
        num += 1  # noqa: SIM113 - kernels know no enumerate


@gluon.jit(do_not_specialize=own.VARYING)
def _combine_kernel(
    q_desc, k_desc, v_desc, part_desc, part_lse_ptr, ids_ptr, start_ptr, out_ptr, lse_ptr, scale_log2, num_tiles,
    num_tokens, H, first_head, num_heads, first_token, tokens_per_head, K, G: gl.constexpr, D: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, MANY: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """Program = every num_programs-th tile of 128 tokens of one query head."""
    dtype: gl.constexpr = k_desc.dtype
    q_buf = gl.allocate_shared_memory(dtype, [2 * BUFFERS, 64, D], k_desc.layout)
    k_buf = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], k_desc.layout)
    q_full = common.barriers(BUFFERS, 1)
    q_empty = common.barriers(BUFFERS, 2)
    k_full = common.barriers(STAGES, 1)
    k_empty = common.barriers(STAGES, 2)
    v_full = common.barriers(STAGES, 1)
    v_empty = common.barriers(STAGES, 2)
    fence_async_shared()
    common.thread_barrier()
    gl.warp_specialize(
        [
            (_attend, (q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty, part_lse_ptr,
                       ids_ptr, start_ptr, out_ptr, lse_ptr, scale_log2, num_tiles, num_tokens, H, first_head,
                       num_heads, first_token, tokens_per_head, K, G, D, KEYS, STAGES, BUFFERS, 0)),
            (_attend, (q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty, part_lse_ptr,
                       ids_ptr, start_ptr, out_ptr, lse_ptr, scale_log2, num_tiles, num_tokens, H, first_head,
                       num_heads, first_token, tokens_per_head, K, G, D, KEYS, STAGES, BUFFERS, 1)),
            (own.stream, (q_desc, q_desc, k_desc, v_desc, part_desc, q_buf, q_buf, k_buf, v_buf, q_full, q_empty,
                          k_full, k_empty, v_full, v_empty, start_ptr, num_tiles, num_tokens, first_head,
                          num_heads, first_token, tokens_per_head, K, G, D, KEYS, STAGES, BUFFERS, False)),
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
        "STAGES": work.stages,
        "BUFFERS": _ROW_BUFFERS,
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
    work: Work = WORK,
) -> None:
    """As `triton_combine.combine` with partials; part [heads, tokens, G * K, D] without gaps."""
    H, D = q_THD.shape[1:]
    G, K = H // k_THD.shape[1], block_ids.shape[-1]
    num_tiles = ceil_div(len(tokens), TILE_ROWS) * len(heads) * G
    _combine_kernel[(min(common.programs(q_THD.device), num_tiles),)](
        common.token_rows(q_THD, HALF_ROWS),
        common.token_rows(k_THD, work.step),
        common.token_rows(v_THD, work.step),
        common.token_rows(part.reshape(-1, G * K, D), TILE_ROWS),
        part_lse,
        block_ids,
        reach.start,
        out_THD,
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
        **constants(D, G, work),
        num_warps=4,
        maxnreg=work.max_registers,
    )
