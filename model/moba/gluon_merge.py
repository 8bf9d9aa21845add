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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from model.moba import gluon_common as common
from model.moba import gluon_own as own
from model.moba.gluon_common import HALF_ROWS, TILE_ROWS, Work
from model.moba.triton_common import LOG2E, ceil_div
from model.moba.triton_reach import Reach
from model.moba.triton_sums import RowSums

WORK = Work(step=128, stages=2, consumer_registers=232, producer_registers=40)


@gluon.jit
def _add_part(buf, used, dq, LAY: gl.constexpr):
    return dq + gl.where(used[:, None], buf.load(LAY).to(gl.float32), 0.0)  # empty slots may hold anything


@gluon.jit
def _gradient(
    q_buf, dout_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty, lse_ptr, delta_ptr, ids_ptr,
    start_ptr, dq_ptr, scale_log2, softmax_scale, num_tiles, num_tokens, H, first_head, num_heads, first_token, K,
    G: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 tokens of every tile."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    dtype: gl.constexpr = k_buf.dtype
    zero = gl.zeros([64, KEYS], gl.float32, SCORE)
    q = q_buf.index(HALF)
    dout = dout_buf.index(HALF)
    num = 0
    ks = 0
    vs = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head, g, first = own.place_of(tile, first_head, num_heads, first_token, G)
        last = gl.minimum(first + 128, num_tokens) - 1
        begin = own.first_key(gl.load(start_ptr + first))
        whole = own.first_key(gl.load(start_ptr + last)) == begin
        plain_end = gl.where(whole, begin + (first - begin) // KEYS * KEYS, begin)
        first_row = first + HALF * 64
        token = first_row + gl.arange(0, 64, gl.SliceLayout(1, SCORE))
        live = token < num_tokens
        start = gl.load(start_ptr + token, mask=live, other=0)
        depth = token - own.first_key(start)
        row = token.to(gl.int64) * H + head * G + g
        lse = gl.load(lse_ptr + row, mask=live, other=float("inf"))
        delta = gl.load(delta_ptr + row, mask=live, other=0.0)
        dq = gl.zeros([64, D], gl.float32, OUT)
        mbarrier.wait(q_full.index(0), num & 1)
        for j in range(begin, last + 1, KEYS):
            k_at = ks % STAGES
            v_at = vs % STAGES
            mbarrier.wait(k_full.index(k_at), (ks // STAGES) & 1)
            score = warpgroup_mma(q, k_buf.index(k_at).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_at), (vs // STAGES) & 1)
            dp = warpgroup_mma(dout, v_buf.index(v_at).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[score])
            s = own.mask(s, first_row, depth, j, j >= plain_end, KEYS, SCORE)
            p = gl.exp2(s * scale_log2 - lse[:, None])
            # Over at once, but it ends a basic block: ptxas moves the exponentials behind the wait otherwise.
            mbarrier.wait(v_full.index(v_at), (vs // STAGES) & 1)
            dp, p = warpgroup_mma_wait(0, deps=[dp, p])
            common.release(v_empty.index(v_at))
            left = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), LEFT)
            product = warpgroup_mma(left, k_buf.index(k_at), dq, is_async=True)
            dq, left = warpgroup_mma_wait(0, deps=[product, left])
            common.release(k_empty.index(k_at))
            ks += 1
            vs += 1

        token = first_row + gl.arange(0, 64, ROW)
        past = (token < num_tokens) & (gl.convert_layout(start, ROW) >= 0)
        at_ids = (token.to(gl.int64) * H + head * G + g) * K
        ids = gl.load(ids_ptr + at_ids, mask=past & (K > 0), other=-1)
        for slot in range(0, K):
            used = ids >= 0
            ids = gl.load(ids_ptr + at_ids + slot + 1, mask=past & (slot + 1 < K), other=-1)
            if slot % 2 == 0:
                at = ks % STAGES
                mbarrier.wait(k_full.index(at), (ks // STAGES) & 1)
                dq = _add_part(k_buf.index(at).slice(HALF * 64, 64), used, dq, OUT)
                fence_async_shared()
                common.release(k_empty.index(at))
                ks += 1
            else:
                at = vs % STAGES
                mbarrier.wait(v_full.index(at), (vs // STAGES) & 1)
                dq = _add_part(v_buf.index(at).slice(HALF * 64, 64), used, dq, OUT)
                fence_async_shared()
                common.release(v_empty.index(at))
                vs += 1
        dq = dq * softmax_scale
        own.store_tile(dq, q, q_empty.index(0), dq_ptr, first_row, head * G + g, num_tokens, H, D, dtype)
        num += 1  # noqa: SIM113 - kernels know no enumerate


@gluon.jit(do_not_specialize=own.VARYING)
def _merge_kernel(
    q_desc, dout_desc, k_desc, v_desc, part_desc, lse_ptr, delta_ptr, ids_ptr, start_ptr, dq_ptr, scale_log2,
    softmax_scale, num_tiles, num_tokens, H, first_head, num_heads, first_token, tokens_per_head, K,
    G: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, MANY: gl.constexpr,
    FEW: gl.constexpr,
):  # fmt: skip
    """Program = every num_programs-th tile of 128 tokens of one query head."""
    dtype: gl.constexpr = k_desc.dtype
    q_buf = gl.allocate_shared_memory(dtype, [2, 64, D], k_desc.layout)
    dout_buf = gl.allocate_shared_memory(dtype, [2, 64, D], k_desc.layout)
    k_buf = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], k_desc.layout)
    q_full = common.barriers(1, 1)
    q_empty = common.barriers(1, 2)
    k_full = common.barriers(STAGES, 1)
    k_empty = common.barriers(STAGES, 2)
    v_full = common.barriers(STAGES, 1)
    v_empty = common.barriers(STAGES, 2)
    fence_async_shared()
    common.thread_barrier()
    gl.warp_specialize(
        [
            (_gradient, (q_buf, dout_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty, lse_ptr,
                         delta_ptr, ids_ptr, start_ptr, dq_ptr, scale_log2, softmax_scale, num_tiles, num_tokens,
                         H, first_head, num_heads, first_token, K, G, D, KEYS, STAGES, 0)),
            (_gradient, (q_buf, dout_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty, lse_ptr,
                         delta_ptr, ids_ptr, start_ptr, dq_ptr, scale_log2, softmax_scale, num_tiles, num_tokens,
                         H, first_head, num_heads, first_token, K, G, D, KEYS, STAGES, 1)),
            (own.stream, (q_desc, dout_desc, k_desc, v_desc, part_desc, q_buf, dout_buf, k_buf, v_buf, q_full,
                          q_empty, k_full, k_empty, v_full, v_empty, start_ptr, num_tiles, num_tokens, first_head,
                          num_heads, first_token, tokens_per_head, K, G, D, KEYS, STAGES, 1, True)),
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
    work: Work = WORK,
) -> None:
    """As `triton_merge.merge_dq` with partials; part [heads, tokens, G * K, D] without gaps."""
    H, D = q_THD.shape[1:]
    G = H // k_THD.shape[1]
    K = block_ids.shape[-1]
    num_tiles = ceil_div(len(tokens), TILE_ROWS) * len(heads) * G
    _merge_kernel[(min(common.programs(q_THD.device), num_tiles),)](
        common.token_rows(q_THD, HALF_ROWS),
        common.token_rows(dout_THD, HALF_ROWS),
        common.token_rows(k_THD, work.step),
        common.token_rows(v_THD, work.step),
        common.token_rows(part.reshape(-1, G * K, D), TILE_ROWS),
        sums.lse_TH,
        sums.delta_TH,
        block_ids,
        reach.start,
        dq_THD,
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
        **constants(D, G, work),
        num_warps=4,
        maxnreg=work.max_registers,
    )
