"""Lists of pairs: both sorts give the plain inversion of the ids, and its tiles and segments."""

import pytest
import torch

pytest.importorskip("triton")
from model.moba import triton_common, triton_lists
from model.moba.triton_cuts import Cuts

pytestmark = pytest.mark.skipif(not triton_common.INTERPRETED, reason="the kernels of this process are compiled")

# tokens, heads, key heads, slots, blocks
CASES = [(70, 4, 2, 3, 5), (90, 4, 1, 2, 9), (33, 6, 2, 4, 40)]
CUTS = Cuts(rows=16, rows_dq=32, segment=20)


def _ids(tokens, heads, slots, blocks):
    """Distinct blocks in any order, a fifth of the slots empty; which tokens need no list."""
    g = torch.Generator().manual_seed(tokens)
    ids = torch.rand((tokens, heads, blocks), generator=g).argsort(-1)[..., :slots].int()
    ids[torch.rand(ids.shape, generator=g) < 0.2] = -1
    return ids, torch.randint(-1, 2, (tokens,), generator=g, dtype=torch.int32)


def _plain(ids, start, group, first_head, num_heads, blocks):
    """Rows (token * H + head) and pair numbers of every list, pair after pair."""
    tokens, heads, slots = ids.shape
    lists = [[] for _ in range(num_heads * (blocks + 1))]
    for token in range(tokens):
        for head in range(num_heads * group if start[token] >= 0 else 0):
            for slot in range(slots):
                block = int(ids[token, first_head * group + head, slot])
                pair = (token * group + head % group) * slots + slot
                if block >= 0:
                    lists[head // group * (blocks + 1) + block].append(
                        (token * heads + first_head * group + head, pair)
                    )
    return lists


@pytest.mark.parametrize("counted", [0, 1 << 22], ids=["radix sort", "counting sort"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_tiles_and_segments(case, counted, monkeypatch):
    tokens, heads, kv_heads, slots, blocks = case
    monkeypatch.setattr(triton_lists, "COUNTED", counted)
    ids, start = _ids(tokens, heads, slots, blocks)
    for first_head, num_heads in ((0, kv_heads), (kv_heads - 1, 1)):
        group = heads // kv_heads
        found = triton_lists.build_lists(ids, start, blocks, group, first_head, num_heads, CUTS)
        expected = _plain(ids, start, group, first_head, num_heads, blocks)
        for entries, offset, count in zip(expected, found.offset.tolist(), found.count.tolist(), strict=True):
            place = slice(offset, offset + count)
            assert list(zip(found.row[place].tolist(), found.pair[place].tolist(), strict=True)) == entries
            assert offset % triton_common.LIST_ALIGN == 0
        for rows, first, end in ((16, 0, tokens), (32, 0, tokens), (48, 0, tokens), (16, 10, 31)):
            _check_tiles(found, expected, heads, rows, first, end)
        cut = found.segments()
        extra = [(i, s) for i, e in enumerate(expected) for s in range(1, -(-len(e) // 20))]
        assert [tuple(x) for x in cut.extra.view(-1, 2)[: int(cut.num_extra)].tolist()] == extra


def _check_tiles(found, expected, heads, rows, first, end):
    """Tiles of the entries of tokens first .. end - 1, list by list."""
    wanted = []
    for number, (entries, offset) in enumerate(zip(expected, found.offset.tolist(), strict=True)):
        inside = [i for i, (row, _) in enumerate(entries) if first <= row // heads < end]
        for i in range(0, len(inside), rows):
            wanted.append([number, offset + inside[i], min(rows, len(inside) - i)])
    work = found.tiles(rows, first, end)
    assert int(work.num_tiles) == len(wanted) <= work.bound
    assert work.tile.view(-1, 4)[: len(wanted), :3].tolist() == wanted


def test_lists_without_cuts_have_no_segments():
    ids, start = _ids(20, 2, 2, 3)
    assert triton_lists.build_lists(ids, start, 3, 1, 0, 2).segments() is None
