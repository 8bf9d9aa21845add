"""The compiled union kernels on a Hopper GPU, in half precision, against the fp32 oracle and the routed path."""

import pytest
import torch

pytest.importorskip("triton")
from eval.bench.timing import captured
from model.moba import triton_op, triton_union_op
from model.moba.api import choose_blocks
from model.moba.blocks import build_block_table
from model.moba.reference import reference_attend
from tests.model.moba.cases import NAMES
from tests.model.moba.test_triton_gpu import CASES, _inputs, _rough, _run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _prepared(case):
    leaves, dout, cu = _inputs(case)
    block_size, topk = case[4:6]
    ids = choose_blocks(*leaves[:2], block_size=block_size, topk=topk, cu_seqlens=cu, backend="triton")
    return leaves, dout, cu, ids, build_block_table(cu, leaves[0].shape[0], block_size)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_plain_half_precision(case):
    leaves, dout, cu, ids, table = _prepared(case)
    size, scale = table.block_size, leaves[0].shape[-1] ** -0.5
    actual = _run(lambda q, k, v: triton_union_op.attend(q, k, v, ids, table, scale), leaves, dout)
    rough = _run(lambda q, k, v: _rough(q, k, v, ids, size, cu), leaves, dout)
    wide = tuple(x.detach().float().requires_grad_() for x in leaves)
    exact = _run(
        lambda q, k, v: reference_attend(q, k, v, ids, block_size=size, cu_seqlens=cu)[0], wide, dout.float()
    )
    for name, a, r, e in zip(NAMES, actual, rough, exact, strict=True):
        error, allowed = (float((x.float() - e).norm() / e.norm()) for x in (a, r))
        assert error <= 2 * allowed, f"{name}: {error:.2e}, plain {allowed:.2e}"


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_three_runs_and_a_graph_give_equal_bits(case):
    leaves, dout, _, ids, table = _prepared(case)
    scale = leaves[0].shape[-1] ** -0.5

    def once():
        return _run(lambda q, k, v: triton_union_op.attend(q, k, v, ids, table, scale), leaves, dout)

    first = once()
    for other in (once(), once(), captured(once)()):
        for name, a, b in zip(NAMES, first, other, strict=True):
            assert torch.equal(a, b), name
    routed = _run(lambda q, k, v: triton_op.attend(q, k, v, ids, table, scale), leaves, dout)
    for name, a, b in zip(NAMES, first, routed, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 1e-2, name
