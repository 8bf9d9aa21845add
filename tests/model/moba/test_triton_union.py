"""The union path against the oracle and the routed path, in Triton's interpreter (fp32, tiny tiles, memory of NaN)."""

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
