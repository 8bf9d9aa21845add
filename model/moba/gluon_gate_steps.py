# mypy: disable-error-code="no-untyped-def"
"""What one tile of the specialised gate consists of: its blocks, its queries, its means, its scores.

Shape legend: triton_common.py; who does what: gluon_gate.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from model.moba import gluon_common as common
from model.moba import gluon_streams as streams


@gluon.jit
def tile(
    own_ptr, first_ptr, number, num_tokens, num_kv_heads, num_tiles, K, TILE: gl.constexpr, COLS: gl.constexpr
):
    """Of the number-th tile: key head, first token; blocks begin, end; where steps without a mask end; `covered`.

    Late tiles, which see most, come first. Covered: every row chooses all of its past.
    """
    head = number % num_kv_heads
    start = (num_tiles - 1 - number // num_kv_heads) * TILE
    last = gl.minimum(start + TILE, num_tokens) - 1
    begin = gl.load(first_ptr + start)
    one = begin == gl.load(first_ptr + last)  # one document
    own_first = gl.load(own_ptr + start)
    end = gl.load(own_ptr + last)
    covered = one & (end - begin <= K)
    plain_end = gl.where(one & (covered == 0), begin + (own_first - begin) // COLS * COLS, begin)
    return head, start, begin, gl.where(covered, begin, end), plain_end, covered


@gluon.jit
def stream_means(
    high_desc, low_desc, mean_buf, full, empty, own_ptr, first_ptr, num_tokens, num_blocks, num_kv_heads,
    num_tiles, K, TILE: gl.constexpr, COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: both parts of the block means of every tile, COLS at a time."""
    step = 0
    for number in range(gl.program_id(0), num_tiles * num_kv_heads, gl.num_programs(0)):
        head, _s, begin, end, _p, _c = tile(
            own_ptr, first_ptr, number, num_tokens, num_kv_heads, num_tiles, K, TILE, COLS
        )
        for j in range(head * num_blocks + begin, head * num_blocks + end, COLS):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * high_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(high_desc, [j, 0], full.index(slot), mean_buf.index(2 * slot))
            tma.async_copy_global_to_shared(low_desc, [j, 0], full.index(slot), mean_buf.index(2 * slot + 1))
            step += 1


@gluon.jit
def copy_queries(
    q_ptr, q, number, num_tokens, num_kv_heads, num_tiles, TILE: gl.constexpr, PART: gl.constexpr, G: gl.constexpr,
    GROUP: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Starts copies of one consumer's rows of the number-th tile, or of the last; rows beyond the end are any."""
    LAY: gl.constexpr = common.row_layout(D, 4)
    number = gl.minimum(number, num_tiles * num_kv_heads - 1)
    start = (num_tiles - 1 - number // num_kv_heads) * TILE + PART * (64 // GROUP)
    r = gl.arange(0, 64, gl.SliceLayout(1, LAY))
    token = gl.minimum(start + r // GROUP, num_tokens - 1)
    row = (token * num_kv_heads + number % num_kv_heads) * G + gl.minimum(r % GROUP, G - 1)
    common.copy_rows(q_ptr, row, q, D, LAY)
    async_copy.commit_group()


@gluon.jit
def score_of(q, mean_buf, full, empty, step, COLS: gl.constexpr, STAGES: gl.constexpr):
    """Scores [64, COLS] of the next step."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    zero = gl.zeros([64, COLS], gl.float32, SCORE)
    slot = step % STAGES
    mbarrier.wait(full.index(slot), (step // STAGES) & 1)
    score = warpgroup_mma(q, mean_buf.index(2 * slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    score = warpgroup_mma(q, mean_buf.index(2 * slot + 1).permute((1, 0)), score, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score])
    common.release(empty.index(slot))
    return score


@gluon.jit
def fill(
    levels, q, mean_buf, full, empty, own_ptr, first_ptr, token, num_tokens, first, middle, stop, step,
    COLS: gl.constexpr, S: gl.constexpr, DEPTH: gl.constexpr, CODES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The scores of blocks first .. stop - 1 into the streams; up to `middle` every row may see all. Next step."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    for j in range(first, middle, COLS):
        score = score_of(q, mean_buf, full, empty, step, COLS, STAGES)
        levels = streams.spread(levels, score, (j - first) // S, COLS, S, DEPTH, CODES)
        step += 1
    if middle < stop:
        at = gl.minimum(gl.convert_layout(token, gl.SliceLayout(1, SCORE)), num_tokens - 1)
        own = gl.load(own_ptr + at)[:, None]
        begin = gl.load(first_ptr + at)[:, None]
        column = gl.arange(0, COLS, gl.SliceLayout(0, SCORE))[None, :]
        for j in range(middle, stop, COLS):
            score = score_of(q, mean_buf, full, empty, step, COLS, STAGES)
            score = gl.where((j + column >= begin) & (j + column < own), score, streams.MASKED)
            levels = streams.spread(levels, score, (j - first) // S, COLS, S, DEPTH, CODES)
            step += 1
    return levels, step
