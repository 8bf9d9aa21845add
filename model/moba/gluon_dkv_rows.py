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
def _fetch(
    i, row_ptr, list_lse_ptr, list_delta_ptr, lse_ptr, delta_ptr, begin, count, steps, first_key, end, head, H,
    G: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Row ids, lse and delta of step i; rows that do not exist get lse = infinity, hence p = 0."""
    r = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    entry = begin + i * ROWS + r
    listed = (entry < count) & (i < steps)
    token = first_key + (i - steps) // G * ROWS + r
    own = (token < end) & (i >= steps)
    own_row = gl.minimum(gl.maximum(token, 0), end - 1) * H + head * G + (i - steps) % G
    row = gl.where(own, own_row, gl.load(row_ptr + entry, mask=listed, other=0))
    lse = gl.where(
        own,
        gl.load(lse_ptr + own_row, mask=own, other=0.0),
        gl.load(list_lse_ptr + entry, mask=listed, other=float("inf")),
    )
    delta = gl.load(list_delta_ptr + entry, mask=listed, other=0.0)
    return row, lse, gl.where(own, gl.load(delta_ptr + own_row, mask=own, other=0.0), delta)


@gluon.jit
def gather(
    q_ptr, dout_ptr, q_buf, dout_buf, lse_buf, delta_buf, full, empty, row_ptr, list_lse_ptr, list_delta_ptr,
    lse_ptr, delta_ptr, begin, count, steps, own, first_key, end, head, H, G: gl.constexpr, ROWS: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Row ids are fetched a step ahead of the copies; a step is announced once the next one is on its way."""
    row, lse, delta = _fetch(
        0, row_ptr, list_lse_ptr, list_delta_ptr, lse_ptr, delta_ptr, begin, count, steps, first_key, end, head, H,
        G, ROWS, WARPS,
    )  # fmt: skip
    for i in range(0, steps + own):
        slot = i % STAGES
        mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
        common.copy_rows(q_ptr, row, q_buf.index(slot), D, WARPS)
        common.copy_rows(dout_ptr, row, dout_buf.index(slot), D, WARPS)
        async_copy.commit_group()
        lse_buf.index(slot).store(lse)
        delta_buf.index(slot).store(delta)
        row, lse, delta = _fetch(
            i + 1, row_ptr, list_lse_ptr, list_delta_ptr, lse_ptr, delta_ptr, begin, count, steps, first_key, end,
            head, H, G, ROWS, WARPS,
        )  # fmt: skip
        if i > 0:
            common.announce(full.index((i - 1) % STAGES), 1)
    if steps + own > 0:
        common.announce(full.index((steps + own - 1) % STAGES), 0)
