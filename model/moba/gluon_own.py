# mypy: disable-error-code="no-untyped-def"
"""What the warp-specialised kernels that walk queries share: the order of tiles, and the warp that streams.

A tile is 128 tokens of one query head. Everything it reads is regular: rows of q (and dout), keys and values of
the run that ends with the tile's last token, and the partials of a slot, which are a column of `part` seen as
[heads x tokens, G * K * D]. All of it comes by TMA: rows in buffers of their own, the rest through one ring, in
the order of use: keys, values, keys, values ..., slot after slot. What a tile needs to know besides (where its
runs start, which slots are used, their lse) its consumers load while they add up the tile before.

Shape legend: triton_common.py; who does what: gluon_common.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from model.moba import gluon_common as common
from model.moba.triton_common import ceil_div

VARYING = ["num_tiles", "num_tokens", "H", "first_head", "num_heads", "first_token", "tokens_per_head", "K"]
VARYING += ["shift"]
_FEW_TURNS = 32


@gluon.jit
def place_of(tile, num_tiles, first_head, num_heads, first_token, shift, G: gl.constexpr):
    """Key head, place in its group and first token of a tile; heads go fastest, see `turned` for shift."""
    programs = gl.num_programs(0)
    turn = tile // programs
    moved = turn * programs + (tile - turn * programs + turn * shift) % programs
    tile = gl.where((turn + 1) * programs <= num_tiles, moved, tile)
    local = tile % (num_heads * G)
    return first_head + local // G, local % G, first_token + tile // (num_heads * G) * 128


def turned(num_tiles: int, programs: int, heads: int, block_size: int) -> int:
    """By how many tiles programs swap places from one turn to the next.

    The tiles of a block have 1, 2, 3 ... steps of keys. Where a program would meet the same place of a block turn
    after turn (132 programs, 32 heads, 4 tiles a block), one with few tiles is done early or late: 8K tokens with
    blocks of 512 gain 8 %. With four times as many tiles it evens out.
    """
    tiles = ceil_div(block_size, 128)
    same = tiles > 1 and programs // heads % tiles == 0
    return heads if same and num_tiles <= _FEW_TURNS * programs else 0


@gluon.jit
def first_key(start):
    """As `triton_reach.first_key`."""
    return start ^ (start >> 31)


@gluon.jit
def runs(start_ptr, first, rows, num_tokens):
    """`Reach.start` of a tile's first and last token, and of the consumer's rows."""
    low = gl.load(start_ptr + first)
    high = gl.load(start_ptr + gl.minimum(first + 128, num_tokens) - 1)
    return low, high, gl.load(start_ptr + gl.minimum(first + rows, num_tokens - 1))


@gluon.jit
def span(low, high, first, num_tokens, KEYS: gl.constexpr):
    """First and last key of a tile, and the key from which on not all rows see all keys."""
    begin = first_key(low)
    plain_end = begin + (first - begin) // KEYS * KEYS
    plain_end = gl.where(first_key(high) == begin, plain_end, begin)
    return begin, gl.minimum(first + 128, num_tokens) - 1, plain_end


@gluon.jit
def mask(s, first_row, depth, j, MASK, KEYS: gl.constexpr, LAY: gl.constexpr):
    """Keys that a row does not see; MASK: whether there are any."""
    if MASK:
        back = first_row - j - gl.arange(0, KEYS, gl.SliceLayout(0, LAY))[None, :]
        back += gl.arange(0, 64, gl.SliceLayout(1, LAY))[:, None]
        s = gl.where((back >= 0) & (back <= depth[:, None]), s, float("-inf"))
    return s


@gluon.jit
def load_box(desc, row, column, ring, full, empty, n, SLOTS: gl.constexpr, BYTES: gl.constexpr):
    """The n-th box that goes through a ring."""
    at = n % SLOTS
    mbarrier.wait(empty.index(at), ((n // SLOTS) & 1) ^ 1)
    mbarrier.expect(full.index(at), BYTES)
    tma.async_copy_global_to_shared(desc, [row, column], full.index(at), ring.index(at))


@gluon.jit
def stream(
    q_desc, dout_desc, k_desc, v_desc, part_desc, q_buf, dout_buf, ring, q_full, q_empty, full, empty, start_ptr,
    num_tiles, num_tokens, first_head, num_heads, first_token, tokens_per_head, K, shift, G: gl.constexpr,
    D: gl.constexpr, KEYS: gl.constexpr, SLOTS: gl.constexpr, GRADIENT: gl.constexpr,
):  # fmt: skip
    """One warp: everything the tiles of this program read, in the order in which it is used."""
    num = 0
    n = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head, g, first = place_of(tile, num_tiles, first_head, num_heads, first_token, shift, G)
        last = gl.minimum(first + 128, num_tokens) - 1
        # Not loaded a tile ahead: Triton 3.6's loop-aware CSE puts its first value in its place then.
        begin = first_key(gl.load(start_ptr + first))
        column = (head * G + g) * D
        mbarrier.wait(q_empty.index(0), (num & 1) ^ 1)
        if GRADIENT:
            mbarrier.expect(q_full.index(0), 4 * 64 * D * 2)
        else:
            mbarrier.expect(q_full.index(0), 2 * 64 * D * 2)
        for half in gl.static_range(2):
            row = first + half * 64
            tma.async_copy_global_to_shared(q_desc, [row, column], q_full.index(0), q_buf.index(half))
            if GRADIENT:
                tma.async_copy_global_to_shared(dout_desc, [row, column], q_full.index(0), dout_buf.index(half))
        for j in range(begin, last + 1, KEYS):
            load_box(k_desc, j, head * D, ring, full, empty, n, SLOTS, KEYS * D * 2)
            load_box(v_desc, j, head * D, ring, full, empty, n + 1, SLOTS, KEYS * D * 2)
            n += 2
        row = (head - first_head) * tokens_per_head + first - first_token
        for s in range(0, K):
            load_box(part_desc, row, (g * K + s) * D, ring, full, empty, n, SLOTS, 128 * D * 2)
            n += 1
        num += 1  # noqa: SIM113 - kernels know no enumerate


@gluon.jit
def store_rows(x, buf, desc, first_row, column, dtype: gl.constexpr):
    """Starts the copy of rows x [64, D] of one consumer through `buf`, which nothing reads any more."""
    common.thread_barrier()
    buf.store(x.to(dtype))
    fence_async_shared()
    common.thread_barrier()
    tma.async_copy_shared_to_global(desc, [first_row, column], buf)


@gluon.jit
def release_stored(empty):
    """The rows that the consumer stored last are read: their buffer is free."""
    tma.store_wait(0)
    common.release(empty)
