"""The warp-specialised fused backward of blocks of 128 on a Hopper GPU: against the fp32 oracle and its twin.

Cases share head counts and have lists that may be cut, so that few kernels are compiled.
"""

import pytest
import torch

pytest.importorskip("triton")
from eval.bench.timing import captured
from model.moba import hopper
from model.moba.api import moba_attention
from model.moba.blocks import build_block_table
from model.moba.reference import reference_attend
from tests.model.moba.cases import NAMES
from tests.model.moba.test_gluon_gpu import _attention, _ids
from tests.model.moba.test_triton_gpu import _inputs, _rough, _run
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(hopper._unusable() is not None, reason=str(hopper._unusable())),
]

# lengths, heads, kv_heads, dim, block_size, topk, dtype
CASES = [
    ([4100], 4, 1, 128, 128, 8, torch.bfloat16),
    ([1, 2500, 300, 1300], 4, 1, 128, 128, 5, torch.bfloat16),
    ([100], 4, 1, 128, 128, 2, torch.bfloat16),
    ([1, 2500, 1600], 4, 1, 64, 128, 5, torch.bfloat16),
]


@pytest.mark.parametrize("dim", hopper.HEAD_DIMS["fused"])
def test_the_specialised_kernel_is_what_runs(dim):
    assert hopper.refusal(dim, 128, "fused") is None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_plain_half_precision(case):
    leaves, dout, cu = _inputs(case)
    ids, table = _ids(leaves, cu, 128, case[5]), build_block_table(cu, leaves[0].shape[0], 128)
    actual = _run(_attention(ids, table), leaves, dout)
    with hopper.twins_only():
        twins = _run(_attention(ids, table), leaves, dout)
    rough = _run(lambda q, k, v: _rough(q, k, v, ids, 128, cu), leaves, dout)
    wide = tuple(x.detach().float().requires_grad_() for x in leaves)
    exact = _run(
        lambda q, k, v: reference_attend(q, k, v, ids, block_size=128, cu_seqlens=cu)[0], wide, dout.float()
    )
    for name, a, r, e, t in zip(NAMES, actual, rough, exact, twins, strict=True):
        error, allowed = (float((x.float() - e).norm() / e.norm()) for x in (a, r))
        assert error <= 2 * allowed, f"{name}: {error:.2e}, plain {allowed:.2e}"
        assert_close(a, t, f"{name} against its twin")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs_give_equal_bits(case):
    """Also replayed from a CUDA graph."""
    leaves, dout, cu = _inputs(case)
    ids, table = _ids(leaves, cu, 128, case[5]), build_block_table(cu, leaves[0].shape[0], 128)

    def once():
        return _run(_attention(ids, table), leaves, dout)

    first, replay = once(), captured(once)
    for again in (once(), once(), replay(), replay()):
        for name, a, b in zip(NAMES, first, again, strict=True):
            assert torch.equal(a, b), name


def test_chunks_of_tokens():
    """A budget of one byte: the kernels that are not fused run, with the same sums in the same order."""
    leaves, dout, cu = _inputs(CASES[1])
    ids, table = _ids(leaves, cu, 128, 5), build_block_table(cu, leaves[0].shape[0], 128)
    whole, chunks = (_run(_attention(ids, table, budget=budget), leaves, dout) for budget in (None, 1))
    for name, a, b in zip(NAMES, whole, chunks, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dim", hopper.HEAD_DIMS["fused"])
def test_lists_that_are_cut_and_blocks_that_nobody_chose(dim):
    """Every query chose block 0: its list of 64K rows is cut into segments; all others are empty."""
    leaves, dout, cu = _inputs(([16384], 4, 1, dim, 128, 2, torch.bfloat16))
    table = build_block_table(cu, 16384, 128)
    ids = torch.where(table.own_block > 0, 0, -1).int()[:, None, None].repeat(1, 4, 1)
    actual, again = (_run(_attention(ids, table), leaves, dout) for _ in range(2))
    with hopper.twins_only():
        twins = _run(_attention(ids, table), leaves, dout)
    for name, a, b, t in zip(NAMES, actual, again, twins, strict=True):
        assert torch.equal(a, b), name
        assert_close(a, t, f"{name} against its twin")


def test_queries_that_choose_all_of_their_past():
    """They run without lists (see triton_reach): keys are seen by queries of later blocks."""
    leaves, dout, cu = _inputs(([3500, 700], 4, 1, 128, 128, 5, torch.bfloat16))

    def once():
        return _run(
            lambda q, k, v: moba_attention(q, k, v, block_size=128, topk=5, cu_seqlens=cu, backend="triton"),
            leaves,
            dout,
        )

    actual = once()
    with hopper.twins_only():
        twins = once()
    for name, a, t in zip(NAMES, actual, twins, strict=True):
        assert_close(a, t, f"{name} against its twin")
