# mypy: disable-error-code="no-untyped-def"
"""Partial results of the past blocks in the warp-specialised kernels that walk queries: eight slots at a time.

Which slots are used, and what they weigh, lies in registers [64, 8] in the layout of the narrowest matrix
instruction: its rows are those of the sums, so that a column of it needs no exchange between warps.

Shape legend: triton_common.py; how the partials come: gluon_own.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from model.moba import gluon_common as common


@gluon.jit
def ids_and_lse(
    ids_ptr, lse_ptr, token, num_tokens, head, g, H, first_head, first_token, tokens_per_head, base, K,
    G: gl.constexpr, LAY: gl.constexpr,
):  # fmt: skip
    """Block ids (-1: none) and lse of slots base .. base + 7 of the consumer's rows [64, 8]."""
    slot = base + gl.arange(0, 8, gl.SliceLayout(0, LAY))[None, :]
    row = (token.to(gl.int64) * H + head * G + g) * K
    pair = ((head - first_head).to(gl.int64) * tokens_per_head + token - first_token) * (G * K) + g * K
    there = (token < num_tokens)[:, None] & (slot < K)
    ids = gl.load(ids_ptr + row[:, None] + slot, mask=there, other=-1)
    return ids, gl.load(lse_ptr + pair[:, None] + slot, mask=there, other=0.0)


@gluon.jit
def weights(lses, top, total, out, ROW: gl.constexpr, META_ROW: gl.constexpr):
    """What eight slots weigh [64, 8], and the sums so far beside them."""
    new_top = gl.maximum(top, gl.convert_layout(gl.max(lses, 1), ROW))
    weight = gl.exp2(lses - gl.convert_layout(new_top, META_ROW)[:, None])
    decay = gl.exp2(top - new_top)
    total = total * decay + gl.convert_layout(gl.sum(weight, 1), ROW)
    return weight, new_top, total, out * decay[:, None]


@gluon.jit
def add_weighted(
    weight, out, ring, full, empty, n, base, K, SLOTS: gl.constexpr, HALF: gl.constexpr, META: gl.constexpr,
    LAY: gl.constexpr,
):  # fmt: skip
    """Adds the partials of slots base .. base + 7, in their order; the last of all is not given back."""
    for slot in range(base, gl.minimum(base + 8, K)):
        column = gl.arange(0, 8, gl.SliceLayout(0, META))[None, :]
        w = gl.sum(gl.where(column == slot - base, weight, 0.0), 1)
        w = gl.convert_layout(w, gl.SliceLayout(1, LAY))[:, None]
        at = n % SLOTS
        mbarrier.wait(full.index(at), (n // SLOTS) & 1)
        part = ring.index(at).slice(HALF * 64, 64).load(LAY)
        if slot + 1 < K:
            fence_async_shared()
            common.release(empty.index(at))
        out += gl.where(w > 0.0, part.to(gl.float32), 0.0) * w  # empty slots may hold anything
        n += 1
    return out, n


@gluon.jit
def block_ids(ids_ptr, token, num_tokens, row_in_token, H, base, K, LAY: gl.constexpr):
    """Block ids of slots base .. base + 7 of the consumer's rows [64, 8]; -1: none."""
    slot = base + gl.arange(0, 8, gl.SliceLayout(0, LAY))[None, :]
    row = (token.to(gl.int64) * H + row_in_token) * K
    return gl.load(ids_ptr + row[:, None] + slot, mask=(token < num_tokens)[:, None] & (slot < K), other=-1)


@gluon.jit
def used_bits(ids, past, LAY: gl.constexpr, ROW: gl.constexpr):
    """Which of eight slots are used, one bit each [64]."""
    slot = gl.arange(0, 8, gl.SliceLayout(0, LAY))[None, :]
    return gl.convert_layout(gl.sum(gl.where((ids >= 0) & past, 1 << slot, 0), 1), ROW)


@gluon.jit
def add(bits, dq, ring, full, empty, n, base, K, SLOTS: gl.constexpr, HALF: gl.constexpr, LAY: gl.constexpr):
    """Adds the partials of slots base .. base + 7, in their order; the last of all is not given back."""
    for slot in range(base, gl.minimum(base + 8, K)):
        used = ((bits >> (slot - base)) & 1) != 0
        at = n % SLOTS
        mbarrier.wait(full.index(at), (n // SLOTS) & 1)
        part = ring.index(at).slice(HALF * 64, 64).load(LAY)
        if slot + 1 < K:
            fence_async_shared()
            common.release(empty.index(at))
        dq += gl.where(used[:, None], part.to(gl.float32), 0.0)  # empty slots may hold anything
        n += 1
    return dq, n
