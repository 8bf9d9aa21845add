"""The Triton kernels against the oracle, in Triton's interpreter (fp32, tiny tiles, memory full of NaN)."""

import pytest
import torch
from torch import Tensor

from model.moba.blocks import BlockTable, build_block_table
from model.moba.reference import reference_attend, reference_choose
from tests.model.moba.cases import NAMES, borders, make_qkv, run
from tests.tolerances import assert_close

triton = pytest.importorskip("triton")
from model.moba import triton_common  # noqa: E402
from model.moba.triton_cuts import Cuts, segment_length  # noqa: E402
from model.moba.triton_gate import choose  # noqa: E402
from model.moba.triton_lists import build_lists  # noqa: E402
from model.moba.triton_op import attend  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not triton_common.INTERPRETED, reason="the kernels of this process are compiled"),
    pytest.mark.usefixtures("nan_memory"),
]

# lengths, heads, kv_heads, dim, block_size, topk
CASES = {
    "one document, ragged tail": ([90], 4, 2, 16, 16, 3),
    "packed, one-token documents": ([1, 39, 1, 16, 33], 4, 2, 16, 16, 3),
    "block no power of two": ([70, 60], 2, 1, 16, 48, 2),
    "blocks of two tiles, one query head per key head": ([150], 2, 2, 32, 64, 3),
    "two tiles of keys in a block": ([70], 2, 2, 16, 64, 2),
    "eight query heads per key head": ([64], 8, 1, 16, 16, 2),
    "three query heads per key head": ([64], 6, 2, 16, 32, 2),
    "own block only": ([50, 14], 4, 2, 16, 16, 1),
    "more slots than past blocks": ([64], 4, 4, 16, 16, 9),
    "more slots than are read at once": ([330], 1, 1, 16, 16, 19),
    "a wide head, ragged tail": ([50, 45], 2, 1, 32, 32, 3),
}


def _case(name: str) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, BlockTable, int, int]:
    lengths, heads, kv_heads, dim, block_size, topk = CASES[name]
    cu = borders(lengths)
    qkv = make_qkv(sum(lengths), heads, kv_heads, dim)
    return qkv, cu, build_block_table(cu, sum(lengths), block_size), block_size, topk


def _compare(qkv, ids, cu, table, budget=None):
    block_size, scale = table.block_size, qkv[0].shape[-1] ** -0.5
    expected = run(lambda q, k, v: reference_attend(q, k, v, ids, block_size=block_size, cu_seqlens=cu)[0], qkv)
    actual = run(lambda q, k, v: attend(q, k, v, ids, table, scale, budget=budget), qkv)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_close(a, e, name)
    return actual


@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(name):
    (q, k, v), cu, table, block_size, topk = _case(name)
    ids = choose(q, k, table, topk - 1)
    expected = reference_choose(q, k, block_size=block_size, topk=topk, cu_seqlens=cu)
    assert torch.equal(ids.sort(-1).values, expected.sort(-1).values)
    _compare((q, k, v), ids, cu, table)


@pytest.mark.parametrize("name", ["one document, ragged tail", "two tiles of keys in a block"])
def test_the_budget_changes_no_bit(name):
    """One byte of scratch: a key head and 128 queries at a time, and the unfused backward."""
    qkv, cu, table, _, topk = _case(name)
    qkv = tuple(torch.cat([x, x.flip(0)])[:136] for x in qkv)  # a chunk of 128 and a short one
    cu = torch.tensor([*cu, 136], dtype=torch.int32)
    table = build_block_table(cu, qkv[0].shape[0], table.block_size)
    ids = choose(qkv[0], qkv[1], table, topk - 1)
    whole = _compare(qkv, ids, cu, table)
    cut = _compare(qkv, ids, cu, table, budget=1)
    for name, a, b in zip(NAMES, whole, cut, strict=True):
        # the fused and the unfused backward are two kernels: equal bits are shown on the GPU
        assert torch.equal(a, b) or (table.block_size <= 32 and name[0] == "d"), name


@pytest.mark.parametrize("block_size", [16, 64])
def test_a_block_for_everybody_and_blocks_for_nobody(block_size):
    """The one long list is cut into segments; the others are empty."""
    tokens = 6 * block_size
    qkv = make_qkv(tokens, 2, 1)
    table = build_block_table(borders([tokens]), tokens, block_size)
    ids = torch.where(table.own_block[:, None, None] > 0, 0, -1).int().expand(tokens, 2, 1).contiguous()
    cuts = Cuts(segment=segment_length(tokens, 2, 1, block_size))
    cut = build_lists(ids, table.own_start, table.block_start.numel(), 2, 0, 1, cuts).segments()
    assert cut is not None and int(cut.num_extra) == -(-2 * (tokens - block_size) // cut.length) - 1 > 0
    _compare(qkv, ids, borders([tokens]), table)


def test_ids_are_taken_as_given_in_any_order():
    """A recomputed forward that is given the saved ids attends to the same blocks, whatever the gate would say."""
    (q, k, v), cu, table, _, topk = _case("one document, ragged tail")
    ids = choose(q, k, table, topk - 1)
    other = torch.where(table.own_block[:, None, None] > 1, torch.tensor([1, 0]), -1).int().expand(90, 4, 2)
    assert not torch.equal(other.sort(-1).values, ids.sort(-1).values)
    _compare((q, k, v), other.contiguous(), cu, table)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ties_go_to_the_lowest_block(sign):
    """Equal keys everywhere: every past block has the same score, positive or negative."""
    tokens, block_size = 16 * 18, 16  # 17 past blocks: two tiles of the gate
    q = torch.ones(tokens, 2, 16)
    k = torch.full((tokens, 1, 16), sign)
    table = build_block_table(borders([tokens]), tokens, block_size)
    ids = choose(q, k, table, 3)
    slot = torch.arange(3)[None, None, :]
    expected = torch.where(slot < table.own_block[:, None, None], slot, -1).expand(tokens, 2, 3)
    assert torch.equal(ids.sort(-1).values, expected.sort(-1).values.int())


def test_refuses_more_pairs_than_positions_count():
    with pytest.raises(ValueError, match="int32"):
        build_lists(torch.empty((1 << 20, 32, 80), dtype=torch.int32, device="meta"), torch.empty(0), 8, 4, 0, 8)
