"""The union path against the oracle and the routed path, in Triton's interpreter (fp32, tiny tiles)."""

import pytest
import torch

from model.moba.blocks import build_block_table
from model.moba.reference import reference_attend, reference_choose
from tests.model.moba.cases import NAMES, borders, make_qkv, run
from tests.tolerances import assert_close

pytest.importorskip("triton")
from model.moba import triton_common, triton_op, triton_union_op
from model.moba.triton_membership import build_membership, build_unit_lists, refusal

pytestmark = [
    pytest.mark.skipif(not triton_common.INTERPRETED, reason="the kernels of this process are compiled"),
    pytest.mark.usefixtures("nan_memory"),
]

# lengths, heads, kv_heads, dim, block_size, topk
CASES = {
    "ragged tail, tiles in the middle of blocks": ([75], 4, 2, 16, 32, 2),
    "packed, short documents, borders inside tiles": ([1, 37, 0, 3, 16, 24], 2, 1, 16, 16, 2),
    "block no power of two": ([55, 60], 2, 1, 16, 48, 2),
    "three query heads per key head": ([40], 3, 1, 16, 16, 2),
    "own block only": ([20, 14], 2, 2, 16, 16, 1),
    "every past block": ([64], 2, 2, 16, 16, 4),
}


def _case(name):
    lengths, heads, kv_heads, dim, block_size, topk = CASES[name]
    cu = borders(lengths)
    q, k, v = make_qkv(sum(lengths), heads, kv_heads, dim)
    ids = reference_choose(q, k, block_size=block_size, topk=topk, cu_seqlens=cu)
    return (q, k, v), cu, build_block_table(cu, sum(lengths), block_size), ids


def _compare(qkv, ids, cu, table):
    block_size, scale = table.block_size, qkv[0].shape[-1] ** -0.5
    expected = run(lambda q, k, v: reference_attend(q, k, v, ids, block_size=block_size, cu_seqlens=cu)[0], qkv)
    actual = run(lambda q, k, v: triton_union_op.attend(q, k, v, ids, table, scale), qkv)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_close(a, e, name)
    return actual


@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(name):
    qkv, cu, table, ids = _case(name)
    _compare(qkv, ids, cu, table)


def test_equals_the_routed_path():
    qkv, _, table, ids = _case("packed, short documents, borders inside tiles")
    scale = qkv[0].shape[-1] ** -0.5
    routed, union = (
        run(lambda q, k, v, path=path: path.attend(q, k, v, ids, table, scale), qkv)
        for path in (triton_op, triton_union_op)
    )
    for name, a, b in zip(NAMES, union, routed, strict=True):
        assert_close(a, b, name)


def test_a_document_whose_blocks_are_in_two_words():
    """Thirty one-token documents, then one with the blocks 30 to 34; rows choose its first and last past block."""
    cu = borders([1] * 30 + [70, 20])
    T = int(cu[-1])
    table = build_block_table(cu, T, 16)
    past = table.own_block > table.first_block
    several = table.own_block - 1 > table.first_block
    ids = torch.stack([torch.where(past, table.first_block, -1), torch.where(several, table.own_block - 1, -1)], 1)
    assert int(ids.max()) > 31 and 30 in ids
    _compare(make_qkv(T, 2, 1), ids[:, None].repeat(1, 2, 1).int(), cu, table)


def test_units_are_those_that_chose_the_block():
    """Key tiles visit the query units with a row that chose their block: no other, none twice, last ones first."""
    (q, k, _), _, table, ids = _case("packed, short documents, borders inside tiles")
    found = build_membership(ids, table, 16)
    units = build_unit_lists(found, table, k.shape[1])
    group = q.shape[1] // k.shape[1]
    for kv in range(k.shape[1]):
        for block in range(table.block_start.numel()):
            token, head = (ids[:, kv * group : (kv + 1) * group] == block).any(-1).nonzero(as_tuple=True)
            expected = {(int(t) // 16, int(h)) for t, h in zip(token, head, strict=True)}
            listed = units.entry[kv, block, : units.count[kv, block]].tolist()
            assert [divmod(e, group) for e in listed] == sorted(expected, key=lambda e: (-e[0], e[1]))


def test_bits_are_those_of_the_listed_blocks():
    _, _, table, ids = _case("every past block")
    found = build_membership(ids, table, 16)
    for t in (0, 17, 63):
        assert int(found.word[0, 0, t]) == (1 << int(table.own_block[t])) - 1
    assert int(found.word[:, :, table.num_tokens :].abs().sum()) == 0  # padding tokens choose nothing


def test_refuses_more_blocks_than_it_has_words_for():
    table = build_block_table(borders([16 * 300]), 16 * 300, 16)
    assert refusal(table, 2) == "299 past blocks, more than 256"
    with pytest.raises(ValueError, match="union attention: 299 past blocks"):
        build_membership(torch.full((4800, 2, 1), -1, dtype=torch.int32), table, 16)
