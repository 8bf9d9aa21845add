# mypy: disable-error-code="no-untyped-def"
"""What a program of the warp-specialised dk, dv kernel works on, and the warps that gather its rows.

Shape legend: triton_common.py; who does what: gluon_common.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from model.moba import gluon_common as common


@gluon.jit
def share(
    extra_ptr, num_extra_ptr, block_start_ptr, block_len_ptr, num_heads, num_lists, num_subs, max_extra, segment,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """This program's work: key head of the pass, block, first entry of its list, first key, end of the block.

    A program without work has end = 0.
    """
    sub = gl.program_id(0) % num_subs
    number = gl.program_id(0) // num_subs - max_extra
    local = number % num_heads
    block = number // num_heads
    begin = gl.to_tensor(0)
    active = gl.to_tensor(1)
    if SPLIT:  # noqa: SIM102 - the outer one is decided by the compiler
        if number < 0:
            extra = number + max_extra
            active = (extra < gl.load(num_extra_ptr)).to(gl.int32)
            lists = gl.load(extra_ptr + extra * 2, mask=active == 1, other=0)
            begin = gl.load(extra_ptr + extra * 2 + 1, mask=active == 1, other=0) * segment
            local = lists // num_lists
            block = lists - local * num_lists
    length = gl.load(block_len_ptr + block)
    start = gl.load(block_start_ptr + block)
    active = (active == 1) & (sub * 128 < length)
    return local, block, begin, gl.where(active, start + sub * 128, 0), gl.where(active, start + length, 0)


@gluon.jit
def store_sums(
    dk, dv, HALF: gl.constexpr, whole, place, dk_ptr, dv_ptr, piece_ptr, first_key, end, head, num_kv_heads,
    softmax_scale, dv_piece, D: gl.constexpr, SPLIT: gl.constexpr, LAY: gl.constexpr,
):  # fmt: skip
    """Sums of 64 keys [64, D] in the layout LAY: to dk, dv if they are of a whole list, else to `piece` from row
    `place` on, those of dv `dv_piece` values behind.
    """
    d = gl.arange(0, D, gl.SliceLayout(0, LAY))
    n = HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAY))
    live = (first_key + n < end)[:, None]
    if whole:
        at = ((first_key + n).to(gl.int64) * num_kv_heads + head)[:, None] * D + d[None, :]
        gl.store(dk_ptr + at, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=live)
        gl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=live)
    elif SPLIT:
        at = (place + n)[:, None] * D + d[None, :]
        gl.store(piece_ptr + at, dk, mask=live)
        gl.store(piece_ptr + at + dv_piece, dv, mask=live)


@gluon.constexpr_function
def sums_layout(dim):
    """Layout [64, dim] in which sums leave shared memory."""
    return gl.BlockedLayout([1, 4], [128 // dim, dim // 4], [4, 1], [1, 0])


@gluon.jit
def _put(
    q_ptr, dout_ptr, row, lse, delta, q_buf, dout_buf, lse_buf, delta_buf, full, empty, step, D: gl.constexpr,
    STAGES: gl.constexpr, LAY: gl.constexpr,
):  # fmt: skip
    """Starts the copies of one step, and announces the step before, whose copies have arrived by now."""
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
    common.copy_rows(q_ptr, row, q_buf.index(slot), D, LAY)
    common.copy_rows(dout_ptr, row, dout_buf.index(slot), D, LAY)
    async_copy.commit_group()
    lse_buf.index(slot).store(lse)
    delta_buf.index(slot).store(delta)
    if step > 0:
        common.announce(full.index((step - 1) % STAGES), 1)


@gluon.jit
def gather(
    q_ptr, dout_ptr, q_buf, dout_buf, lse_buf, delta_buf, full, empty, row_ptr, list_lse_ptr, list_delta_ptr,
    lse_ptr, delta_ptr, begin, count, steps, own, first_key, seen, head, H, G: gl.constexpr, ROWS: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Rows of the list, then those that see the keys without one (tokens first_key to seen - 1). Rows that do not
    exist get lse = infinity, hence p = 0.

    What a step needs from memory before its copies can start is loaded a step ahead.
    """
    LAY: gl.constexpr = common.row_layout(D, WARPS)
    r = gl.arange(0, ROWS, gl.SliceLayout(1, LAY))
    n = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    row = gl.load(row_ptr + begin + r, mask=begin + r < count, other=0)
    lse = gl.load(list_lse_ptr + begin + n, mask=begin + n < count, other=float("inf"))
    delta = gl.load(list_delta_ptr + begin + n, mask=begin + n < count, other=0.0)
    for step in range(0, steps):
        _put(q_ptr, dout_ptr, row, lse, delta, q_buf, dout_buf, lse_buf, delta_buf, full, empty, step, D, STAGES,
             LAY)  # fmt: skip
        i = begin + (step + 1) * ROWS
        row = gl.load(row_ptr + i + r, mask=i + r < count, other=0)
        lse = gl.load(list_lse_ptr + i + n, mask=i + n < count, other=float("inf"))
        delta = gl.load(list_delta_ptr + i + n, mask=i + n < count, other=0.0)
    at = gl.minimum(first_key + n, seen - 1) * H + head * G
    lse = gl.load(lse_ptr + at, mask=(own > 0) & (first_key + n < seen), other=float("inf"))
    delta = gl.load(delta_ptr + at, mask=(own > 0) & (first_key + n < seen), other=0.0)
    for i in range(0, own):
        row = gl.minimum(first_key + i // G * ROWS + r, seen - 1) * H + head * G + i % G
        _put(q_ptr, dout_ptr, row, lse, delta, q_buf, dout_buf, lse_buf, delta_buf, full, empty, steps + i, D,
             STAGES, LAY)  # fmt: skip
        token = first_key + (i + 1) // G * ROWS + n
        at = gl.minimum(token, seen - 1) * H + head * G + (i + 1) % G
        lse = gl.load(lse_ptr + at, mask=token < seen, other=float("inf"))
        delta = gl.load(delta_ptr + at, mask=token < seen, other=0.0)
    if steps + own > 0:
        common.announce(full.index((steps + own - 1) % STAGES), 0)
