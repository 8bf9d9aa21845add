# mypy: disable-error-code="no-untyped-def"
"""A stable counting sort of the pairs by the block they chose, for short inputs (see `triton_lists`).

The pairs of a key head are cut into chunks. Every chunk counts its pairs per list; running sums over the chunks
say where each chunk's share of a list starts; then every chunk walks its pairs again, 32 at a time, and a pair's
place is that start plus the number of earlier pairs of the chunk in the same list. Only integers are added and
each chunk is walked in order: lists come out in the order of their pairs, in every run.

Against a radix sort (`triton_sort`): no keys and no 8-byte positions move through memory, and few launches. But
every place is written by itself, so it wins only while the cache holds what is written.

Shape legend: triton_common.py; lists: triton_lists.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common

_STEP = 128 if common.INTERPRETED else 32  # pairs walked at a time: one warp, or what makes the interpreter quick
_MATCH = tl.constexpr(not common.INTERPRETED)
_LISTS = tl.constexpr(32)  # lists per program of the running sums
_CHUNKS = tl.constexpr(128)  # chunks per step of the running sums
_MAX_BINS = 1024  # lists counted in shared memory
_PIECE = 1024  # pairs counted at a time
_WALKERS = 4096  # programs of one warp that one H200 runs at a time, about


@triton.jit
def list_of(ids_ptr, start_ptr, pair, live, K, H, head, num_lists, G: tl.constexpr):
    """List of each pair of a key head; empty slots, and those of queries that need no list, belong to the last."""
    token = pair // (G * K)
    live &= tl.load(start_ptr + token, mask=live, other=0) >= 0  # see triton_reach
    at = token.to(tl.int64) * (H * K) + head * (G * K) + (pair - token * (G * K))
    block = tl.load(ids_ptr + at, mask=live, other=-1)
    return tl.where(block < 0, num_lists - 1, block)


@triton.jit(do_not_specialize=["K", "H", "first_head", "num_lists", "pairs_per_head", "num_chunks", "chunk"])
def _count_kernel(
    ids_ptr, start_ptr, counter_ptr, K, H, first_head, num_lists, pairs_per_head, num_chunks, chunk,
    G: tl.constexpr, BINS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Program = (key head, chunk): pairs per list, int32 [heads, chunks, lists].

    BINS > 0: counted in shared memory; 0 (many lists): by integer atomics on the chunk's own counters.
    """
    number = tl.program_id(0)
    head = number // num_chunks
    first = (number - head * num_chunks) * chunk
    end = tl.minimum(first + chunk, pairs_per_head)
    counter = counter_ptr + number.to(tl.int64) * num_lists
    i = tl.arange(0, PIECE)
    if BINS > 0:
        total = tl.zeros([BINS], tl.int32)
        for base in tl.range(first, end, PIECE):
            live = base + i < end
            lists = list_of(ids_ptr, start_ptr, base + i, live, K, H, first_head + head, num_lists, G)
            total += tl.histogram(lists, BINS, mask=live)
        bins = tl.arange(0, BINS)
        tl.store(counter + bins, total, mask=bins < num_lists)
    else:
        for base in tl.range(0, num_lists, PIECE):
            tl.store(counter + base + i, tl.zeros([PIECE], tl.int32), mask=base + i < num_lists)
        tl.debug_barrier()  # the counters are zero before anyone adds to them
        for base in tl.range(first, end, PIECE):
            live = base + i < end
            lists = list_of(ids_ptr, start_ptr, base + i, live, K, H, first_head + head, num_lists, G)
            tl.atomic_add(counter + lists, 1, mask=live, sem="relaxed")


@triton.jit(do_not_specialize=["num_lists", "num_chunks", "pieces"])
def _sum_kernel(counter_ptr, total_ptr, num_lists, num_chunks, pieces):
    """Program = (key head, 32 lists): counts become sums over the chunks before; the sum of all is the total."""
    head = tl.program_id(0) // pieces
    lists = tl.program_id(0) % pieces * _LISTS + tl.arange(0, _LISTS)
    live = lists < num_lists
    base = counter_ptr + head.to(tl.int64) * num_chunks * num_lists
    done = tl.zeros([_LISTS], tl.int32)
    for first in tl.range(0, num_chunks, _CHUNKS):
        chunk = first + tl.arange(0, _CHUNKS)
        at = base + chunk.to(tl.int64)[:, None] * num_lists + lists[None, :]
        inside = (chunk < num_chunks)[:, None] & live[None, :]
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, done[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        done += tl.sum(count, 0)
    tl.store(total_ptr + head * num_lists + lists, done, mask=live)


@triton.jit
def _same(lists, i):
    """How many of the pairs of this step are in the same list: those before each, and all."""
    if _MATCH:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 same, below;
            match.any.sync.b32 same, $2, 0xffffffff;
            popc.b32 $1, same;
            mov.u32 below, %lanemask_lt;
            and.b32 same, same, below;
            popc.b32 $0, same;
            }""",
            "=&r,=&r,r", [lists], dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        equal = (lists[:, None] == lists[None, :]).to(tl.int32)
        return tl.sum(tl.where(i[None, :] < i[:, None], equal, 0), 1), tl.sum(equal, 1)


@triton.jit(do_not_specialize=["K", "H", "first_head", "num_lists", "pairs_per_head", "num_chunks", "chunk"])
def _walk_kernel(
    ids_ptr, start_ptr, counter_ptr, offset_ptr, row_ptr, pair_ptr,
    K, H, first_head, num_lists, pairs_per_head, num_chunks, chunk, G: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program = (key head, chunk), one warp: writes row id and pair number of every pair to its place.

    The chunk's own row of counters runs along; one lane of each list advances it, so nothing is atomic.
    """
    number = tl.program_id(0)
    head = number // num_chunks
    first = (number - head * num_chunks) * chunk
    end = tl.minimum(first + chunk, pairs_per_head)
    counter = counter_ptr + number.to(tl.int64) * num_lists
    i = tl.arange(0, STEP)
    ahead = list_of(ids_ptr, start_ptr, first + i, first + i < end, K, H, first_head + head, num_lists, G)
    for base in tl.range(first, end, STEP):
        pair = base + i
        live = pair < end
        lists = tl.where(live, ahead, num_lists)  # what lies past the end: a list of its own, never written
        ahead = list_of(ids_ptr, start_ptr, pair + STEP, pair + STEP < end, K, H, first_head + head, num_lists, G)
        used = live & (lists != num_lists - 1)
        before, all_of_it = _same(lists, i)
        done = tl.load(counter + lists, mask=used, other=0)
        place = tl.load(offset_ptr + head * num_lists + lists, mask=used, other=0) + done + before
        tl.debug_barrier()  # every lane has read its counter before one advances it
        tl.store(counter + lists, done + all_of_it, mask=used & (before == all_of_it - 1))
        row = pair // K  # token * G + g
        token = row // G
        tl.store(pair_ptr + place, pair, mask=used)
        tl.store(row_ptr + place, token * H + (first_head + head) * G + (row - token * G), mask=used)
        tl.debug_barrier()


@dataclass(frozen=True)
class Walk:
    """Counted pairs of some key heads.

    counter: int32 [heads, chunks, lists], pairs of the chunks before; total: int32 [heads * lists].
    """

    start: Tensor
    counter: Tensor
    total: Tensor
    group: int
    first_head: int
    num_heads: int
    num_lists: int
    chunk: int


def chunk_pairs(pairs: int, num_lists: int) -> int:
    """Pairs per chunk: enough chunks to fill the GPU, and no more counters than pairs."""
    return common.next_power_of_two(max(pairs // _WALKERS, num_lists, _STEP))


def count(block_ids: Tensor, start: Tensor, group: int, first_head: int, num_heads: int, num_lists: int) -> Walk:
    """Counts the pairs of block_ids int32 [T, H, K] per list of some key heads; lists per head: NB + 1.

    start: `Reach.start`.
    """
    T, H, K = block_ids.shape
    per_head = T * group * K
    chunk = chunk_pairs(per_head * num_heads, num_lists)
    chunks = common.ceil_div(per_head, chunk)
    counter = torch.empty(num_heads * chunks * num_lists, dtype=torch.int32, device=block_ids.device)
    total = torch.empty(num_heads * num_lists, dtype=torch.int32, device=block_ids.device)
    bins = max(32, common.next_power_of_two(num_lists))
    _count_kernel[(num_heads * chunks,)](
        block_ids,
        start,
        counter,
        K,
        H,
        first_head,
        num_lists,
        per_head,
        chunks,
        chunk,
        G=group,
        BINS=bins if bins <= _MAX_BINS else 0,
        PIECE=min(chunk, _PIECE),
        num_warps=4,
    )
    pieces = common.ceil_div(num_lists, _LISTS.value)
    _sum_kernel[(num_heads * pieces,)](counter, total, num_lists, chunks, pieces, num_warps=4)
    return Walk(start, counter, total, group, first_head, num_heads, num_lists, chunk)


def write(walk: Walk, block_ids: Tensor, offset: Tensor, row: Tensor, pair: Tensor) -> None:
    """Row id and pair number of every pair to its place in row, pair [entries]; uses the counters up."""
    T, H, K = block_ids.shape
    per_head = T * walk.group * K
    chunks = common.ceil_div(per_head, walk.chunk)
    _walk_kernel[(walk.num_heads * chunks,)](
        block_ids,
        walk.start,
        walk.counter,
        offset,
        row,
        pair,
        K,
        H,
        walk.first_head,
        walk.num_lists,
        per_head,
        chunks,
        walk.chunk,
        G=walk.group,
        STEP=_STEP,
        num_warps=1,
    )
