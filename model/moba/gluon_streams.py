# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005 - kernels know no unpacking
"""The best of a long run of scores per row, found without comparing them across columns as they come.

Column c of a step's scores goes to stream c % S, and every stream of a row keeps its DEPTH best: a maximum and a
minimum per score and place, nothing between threads, no loop that depends on values. What is left, S * DEPTH
scores a row, makes the list of the K best once in CODES * S columns. The low bits of a score carry the number of
its group of S columns, the stream says which of the group it is; scores are compared without those bits.

A row whose best include the last place of a stream may have lost one that fell off behind it; such rows are told.

Shape legend: triton_common.py.
"""

from __future__ import annotations

from math import comb

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

NOTHING = gl.constexpr(-2.0e38)  # what an empty place in the list of the best holds
MASKED = gl.constexpr(-3.0e38)  # score of a block that may not be chosen
_PASS_NAN = gl.constexpr(tl.PropagateNan.ALL)
_LOWEST = gl.constexpr(-2147483647)


def depth_for(num_past: int, streams: int, lost: float) -> int:
    """Places of each stream for a share `lost` of rows to lose one of their best, which lie in random streams."""
    depth = 1
    while depth < num_past and comb(num_past, depth) / streams ** (depth - 1) > lost:
        depth += 1
    return depth


@gluon.constexpr_function
def list_layout(slots):
    """[64, slots]: rows as in a warpgroup's matrix instruction, four threads along a row."""
    regs = [[0, 4 << i] for i in range(slots.bit_length() - 3)] + [[8, 0]]
    return gl.DistributedLinearLayout(
        regs, [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, slots]
    )


@gluon.jit
def empty_list(K, SLOTS: gl.constexpr):
    """best, ids [64, SLOTS] of a row that has chosen nothing; places beyond K stay as they are."""
    LIST: gl.constexpr = list_layout(SLOTS)
    place = gl.arange(0, SLOTS, gl.SliceLayout(0, LIST))[None, :]
    best = gl.where(place < K, NOTHING, float("inf")) + gl.zeros([64, SLOTS], gl.float32, LIST)
    return best, (-1 - place) + gl.zeros([64, SLOTS], gl.int32, LIST)


@gluon.jit
def _halves(x, COLS: gl.constexpr):
    return gl.split(gl.permute(gl.reshape(x, [64, 2, COLS // 2]), (0, 2, 1)))


@gluon.jit
def first_group(x, COLS: gl.constexpr, S: gl.constexpr):
    """The first S columns of x [64, COLS], where they lie in the threads."""
    a, _b = _halves(x, COLS)
    if COLS == 2 * S:
        return a
    else:
        c, _d = _halves(a, COLS // 2)
        return c


@gluon.jit
def empty(S: gl.constexpr, DEPTH: gl.constexpr, LAY: gl.constexpr):
    """Streams without scores: DEPTH tensors [64, S], best first."""
    levels = ()
    for _ in gl.static_range(DEPTH):
        levels = levels + (gl.full([64, S], MASKED, gl.float32, LAY),)
    return levels


@gluon.jit
def _push(levels, score, group, DEPTH: gl.constexpr, CODES: gl.constexpr):
    """One score [64, S] per stream. A NaN falls through all places."""
    # one instruction, where (score & mask) | code became two; of equal positive scores the lower block's is larger
    MERGE: gl.constexpr = f"lop3.b32 $0, $1, {-CODES}, $2, 0xea;"
    bits = gl.inline_asm_elementwise(
        MERGE,
        "=r,r,r",
        [score.to(gl.int32, bitcast=True), CODES - 1 - group],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    x = bits.to(gl.float32, bitcast=True)
    new = ()
    for i in gl.static_range(DEPTH):
        new = new + (gl.maximum(levels[i], x),)
        if i < DEPTH - 1:
            x = gl.minimum(levels[i], x, propagate_nan=_PASS_NAN)
    return new


@gluon.jit
def spread(levels, score, group, COLS: gl.constexpr, S: gl.constexpr, DEPTH: gl.constexpr, CODES: gl.constexpr):
    """The scores [64, COLS] of a step into the streams. group: number of its first S columns, below CODES."""
    a, b = _halves(score, COLS)
    if COLS == 2 * S:
        levels = _push(levels, a, group, DEPTH, CODES)
        return _push(levels, b, group + 1, DEPTH, CODES)
    else:
        gl.static_assert(COLS == 4 * S)
        c, d = _halves(a, COLS // 2)
        e, f = _halves(b, COLS // 2)
        levels = _push(levels, c, group, DEPTH, CODES)
        levels = _push(levels, d, group + 1, DEPTH, CODES)
        levels = _push(levels, e, group + 2, DEPTH, CODES)
        return _push(levels, f, group + 3, DEPTH, CODES)


@gluon.jit
def _top(levels, first, S: gl.constexpr, CODES: gl.constexpr):
    """The best score of each row's streams: packed, its value, the first block of its group."""
    top = gl.max(levels[0], 1)
    value, group = _unpack(top, first, S, CODES)
    return top, value, group


@gluon.jit
def _unpack(packed, first, S: gl.constexpr, CODES: gl.constexpr):
    bits = packed.to(gl.int32, bitcast=True)
    return (bits & -CODES).to(gl.float32, bitcast=True), first + ((CODES - 1) - (bits & (CODES - 1))) * S


@gluon.jit
def _take(levels, top, S: gl.constexpr, DEPTH: gl.constexpr):
    """The lowest stream that begins with `top`, and the streams without that score."""
    stream = gl.arange(0, S, gl.SliceLayout(0, levels[0].type.layout))
    here = gl.min(gl.where(levels[0] == top[:, None], stream[None, :], S), 1)
    taken = stream[None, :] == here[:, None]
    new = ()
    for i in gl.static_range(DEPTH - 1):
        new = new + (gl.where(taken, levels[i + 1], levels[i]),)
    return here, new + (gl.where(taken, MASKED, levels[DEPTH - 1]),)


@gluon.jit
def _put(best, ids, places, value, block):
    """One value of each row to its `places` of the list, which is [64, slots] in its own layout."""
    LIST: gl.constexpr = best.type.layout
    PLACE: gl.constexpr = gl.SliceLayout(1, LIST)
    best = gl.where(places, gl.convert_layout(value, PLACE)[:, None], best)
    return best, gl.where(places, gl.convert_layout(block, PLACE)[:, None], ids)


@gluon.jit
def _worst(best, ids, ROW: gl.constexpr):
    """The lowest value of each row's list, and the highest id that has it: the one to evict."""
    low = gl.min(best, 1)
    id = gl.max(gl.where(best == low[:, None], ids, _LOWEST), 1)
    return gl.convert_layout(low, ROW), gl.convert_layout(id, ROW)


@gluon.jit
def drain(
    levels, first, best, ids, K, fresh, S: gl.constexpr, DEPTH: gl.constexpr, CODES: gl.constexpr,
    MANY: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """What the streams hold into the lists best, ids [64, slots].

    Args:
        first: block of the streams' first column. fresh: the lists are empty.
        MANY: lists are made from streams more than once. EXACT: DEPTH >= K, no score can be lost.

    Returns:
        the lists, and 1 for rows that may have lost a score that belongs to them.
    """
    ROW: gl.constexpr = gl.SliceLayout(1, levels[0].type.layout)
    LIST: gl.constexpr = best.type.layout
    place = gl.arange(0, best.shape[1], gl.SliceLayout(0, LIST))
    last = gl.max(levels[DEPTH - 1], 1)
    top, value, group = _top(levels, first, S, CODES)
    if fresh:
        for i in range(K):
            here, levels = _take(levels, top, S, DEPTH)
            real = gl.convert_layout(value > NOTHING, gl.SliceLayout(1, LIST))
            best, ids = _put(best, ids, (place == i)[None, :] & real[:, None], value, group + here)
            top, value, group = _top(levels, first, S, CODES)
    worst, worst_id = _worst(best, ids, ROW)
    if MANY:
        more = gl.max(_may_belong(value, group, worst, worst_id), 0)
        while more > 0:
            here, levels = _take(levels, top, S, DEPTH)
            better = (value > worst) | ((value == worst) & (group + here < worst_id))
            better = gl.convert_layout(better, gl.SliceLayout(1, LIST))
            evict = ids == gl.convert_layout(worst_id, gl.SliceLayout(1, LIST))[:, None]
            best, ids = _put(best, ids, evict & better[:, None], value, group + here)
            worst, worst_id = _worst(best, ids, ROW)
            top, value, group = _top(levels, first, S, CODES)
            more = gl.max(_may_belong(value, group, worst, worst_id), 0)
        lost = gl.zeros([64], gl.int32, ROW)
    else:
        lost = ((value == worst) & (value <= 0)).to(gl.int32)  # a tie whose order is not that of the blocks
    if not EXACT:
        value, group = _unpack(last, first, S, CODES)
        lost |= _may_belong(value, group + S, worst, worst_id)  # behind it: a group further on, or more
    return best, ids, lost


@gluon.jit
def _may_belong(value, group, worst, worst_id):
    """1 where a score of this value, in the group that starts at block `group` or later, may belong to the best.

    Equal scores come in the order of their blocks only if they are positive.
    """
    tie = (value == worst) & ((value <= 0) | (group < worst_id))
    return ((value > worst) | tie).to(gl.int32)
