# mypy: disable-error-code="no-untyped-def"
"""What the warp-specialised kernels that walk queries share: the warp that streams keys, values and partials.

A tile is 128 tokens of one query head. Everything it reads is regular: rows of q (and dout), keys and values of
the run that ends with the tile's last token, and the partials of a slot, which are a column of `part` seen as
[heads x tokens, G * K * D]; all by TMA, partials through the rings of keys (even slots) and values (odd slots).

Shape legend: triton_common.py; who does what: gluon_common.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from model.moba import gluon_common as common

VARYING = ["num_tiles", "num_tokens", "H", "first_head", "num_heads", "first_token", "tokens_per_head", "K"]


@gluon.jit
def place_of(tile, first_head, num_heads, first_token, G: gl.constexpr):
    """Key head, place in its group and first token of a tile; heads go fastest: evens out the causal work."""
    local = tile % (num_heads * G)
    return first_head + local // G, local % G, first_token + tile // (num_heads * G) * 128


@gluon.jit
def first_key(start):
    """As `triton_reach.first_key`."""
    return start ^ (start >> 31)


@gluon.jit
def mask(s, first_row, depth, j, MASK, KEYS: gl.constexpr, LAY: gl.constexpr):
    """Keys that a row does not see; MASK: whether there are any."""
    if MASK:
        back = first_row - j - gl.arange(0, KEYS, gl.SliceLayout(0, LAY))[None, :]
        back += gl.arange(0, 64, gl.SliceLayout(1, LAY))[:, None]
        s = gl.where((back >= 0) & (back <= depth[:, None]), s, float("-inf"))
    return s


@gluon.jit
def stream(
    q_desc, dout_desc, k_desc, v_desc, part_desc, q_buf, dout_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty,
    v_full, v_empty, start_ptr, num_tiles, num_tokens, first_head, num_heads, first_token, tokens_per_head, K,
    G: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
    GRADIENT: gl.constexpr,
):  # fmt: skip
    """One warp: everything the tiles of this program read, in the order in which it is used."""
    num = 0
    ks = 0
    vs = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head, g, first = place_of(tile, first_head, num_heads, first_token, G)
        last = gl.minimum(first + 128, num_tokens) - 1
        begin = first_key(gl.load(start_ptr + first))
        slot = num % BUFFERS
        column = (head * G + g) * D
        mbarrier.wait(q_empty.index(slot), ((num // BUFFERS) & 1) ^ 1)
        if GRADIENT:
            mbarrier.expect(q_full.index(slot), 4 * 64 * D * 2)
        else:
            mbarrier.expect(q_full.index(slot), 2 * 64 * D * 2)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                q_desc, [first + half * 64, column], q_full.index(slot), q_buf.index(slot * 2 + half)
            )
            if GRADIENT:
                tma.async_copy_global_to_shared(
                    dout_desc, [first + half * 64, column], q_full.index(slot), dout_buf.index(slot * 2 + half)
                )
        for j in range(begin, last + 1, KEYS):
            at = ks % STAGES
            mbarrier.wait(k_empty.index(at), ((ks // STAGES) & 1) ^ 1)
            mbarrier.expect(k_full.index(at), KEYS * D * 2)
            tma.async_copy_global_to_shared(k_desc, [j, head * D], k_full.index(at), k_buf.index(at))
            ks += 1
            at = vs % STAGES
            mbarrier.wait(v_empty.index(at), ((vs // STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(at), KEYS * D * 2)
            tma.async_copy_global_to_shared(v_desc, [j, head * D], v_full.index(at), v_buf.index(at))
            vs += 1
        row = (head - first_head) * tokens_per_head + first - first_token
        for s in range(0, K):
            column = (g * K + s) * D
            if s % 2 == 0:
                at = ks % STAGES
                mbarrier.wait(k_empty.index(at), ((ks // STAGES) & 1) ^ 1)
                mbarrier.expect(k_full.index(at), 128 * D * 2)
                tma.async_copy_global_to_shared(part_desc, [row, column], k_full.index(at), k_buf.index(at))
                ks += 1
            else:
                at = vs % STAGES
                mbarrier.wait(v_empty.index(at), ((vs // STAGES) & 1) ^ 1)
                mbarrier.expect(v_full.index(at), 128 * D * 2)
                tma.async_copy_global_to_shared(part_desc, [row, column], v_full.index(at), v_buf.index(at))
                vs += 1
        num += 1  # noqa: SIM113 - kernels know no enumerate


@gluon.jit
def store_tile(
    x, buf, empty, to_ptr, first_row, row_in_token, num_tokens, H, D: gl.constexpr, dtype: gl.constexpr
):
    """Rows x [64, D] of one consumer to [T, H, D], through its rows of q, which nothing reads any more."""
    LAY: gl.constexpr = common.row_layout(D, 4)
    buf.store(x.to(dtype))
    common.thread_barrier()
    token = first_row + gl.arange(0, 64, gl.SliceLayout(1, LAY))
    at = (token.to(gl.int64) * H + row_in_token) * D
    result = buf.load(LAY)
    fence_async_shared()
    common.release(empty)
    columns = gl.arange(0, D, gl.SliceLayout(0, LAY))
    gl.store(to_ptr + at[:, None] + columns[None, :], result, mask=(token < num_tokens)[:, None])
