"""The compiled kernels on a Hopper GPU, in half precision, against the fp32 oracle."""

import pytest
import torch

pytest.importorskip("triton")
from eval.bench.timing import captured
from model.moba.api import choose_blocks, moba_attention
from model.moba.blocks import build_block_table
from model.moba.reference import reference_attend, reference_choose
from model.moba.triton_op import attend
from tests.model.moba.cases import NAMES, borders

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# lengths, heads, kv_heads, dim, block_size, topk, dtype
CASES = [
    ([2048], 8, 2, 128, 128, 8, torch.bfloat16),
    ([2048], 8, 2, 128, 512, 3, torch.bfloat16),
    ([2048], 8, 2, 64, 128, 8, torch.bfloat16),
    ([2048], 8, 1, 64, 512, 3, torch.bfloat16),
    ([1, 699, 600, 700], 8, 2, 128, 48, 4, torch.bfloat16),
    ([1000, 1, 1048], 4, 4, 128, 16, 12, torch.bfloat16),
    ([1111], 6, 2, 64, 64, 5, torch.float16),
    ([2000], 4, 2, 128, 256, 1, torch.float16),
    ([3000], 4, 2, 128, 1040, 2, torch.bfloat16),
]


def _inputs(case, seed=0):
    lengths, heads, kv_heads, dim, _, _, dtype = case
    g = torch.Generator("cuda").manual_seed(seed)
    q, k, v, dout = (
        torch.randn((sum(lengths), h, dim), device="cuda", dtype=dtype, generator=g)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), dout, borders(lengths).cuda()


def _run(attention, leaves, dout):
    out = attention(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def _rough(q, k, v, ids, block_size, cu):
    """The oracle's mask, every step in the dtype of the inputs."""
    T, H, D = q.shape
    G = H // k.shape[1]
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    table = build_block_table(cu, T, block_size)
    own = table.own_block.long()
    listed = torch.zeros((T, H, int(own.max()) + 2), dtype=torch.bool, device=q.device)
    listed.scatter_(-1, ids.long() % listed.shape[-1], True)
    listed[..., -1] = False
    token = torch.arange(T, device=q.device)
    visible = listed[:, :, own] | ((own[:, None] == own) & (token[:, None] >= token))[:, None]
    score = (torch.einsum("thd,shd->ths", q, k) * D**-0.5).masked_fill(~visible, -torch.inf)
    return torch.einsum("ths,shd->thd", torch.softmax(score, -1), v)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_plain_half_precision(case):
    leaves, dout, cu = _inputs(case)
    block_size, topk = case[4:6]
    ids = choose_blocks(*leaves[:2], block_size=block_size, topk=topk, cu_seqlens=cu, backend="triton")
    table = build_block_table(cu, leaves[0].shape[0], block_size)
    actual = _run(lambda q, k, v: attend(q, k, v, ids, table, q.shape[-1] ** -0.5), leaves, dout)
    rough = _run(lambda q, k, v: _rough(q, k, v, ids, block_size, cu), leaves, dout)
    wide = tuple(x.detach().float().requires_grad_() for x in leaves)
    exact = _run(
        lambda q, k, v: reference_attend(q, k, v, ids, block_size=block_size, cu_seqlens=cu)[0], wide, dout.float()
    )
    for name, a, r, e in zip(NAMES, actual, rough, exact, strict=True):
        error, allowed = (float((x.float() - e).norm() / e.norm()) for x in (a, r))
        assert error <= 2 * allowed, f"{name}: {error:.2e}, plain {allowed:.2e}"
    expected = reference_choose(*leaves[:2], block_size=block_size, topk=topk, cu_seqlens=cu)[..., : ids.shape[-1]]
    same = ids.sort(-1, descending=True).values == expected.sort(-1, descending=True).values
    assert float(same.all(-1).float().mean()) > 0.999  # scores within 2^-18 of each other may swap


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_runs_and_budgets_give_equal_bits(case):
    """Three runs; and one byte of scratch, which cuts by key head and query and takes the unfused backward."""
    leaves, dout, cu = _inputs(case)
    block_size, topk = case[4:6]
    table = build_block_table(cu, leaves[0].shape[0], block_size)

    def once(budget):
        ids = choose_blocks(*leaves[:2], block_size=block_size, topk=topk, cu_seqlens=cu, backend="triton")
        scale = leaves[0].shape[-1] ** -0.5
        return ids, *_run(lambda q, k, v: attend(q, k, v, ids, table, scale, budget=budget), leaves, dout)

    first = once(None)
    for budget in (None, None, 1):
        for name, a, b in zip(("ids", *NAMES), first, once(budget), strict=True):
            assert torch.equal(a, b), f"{name}, budget {budget}"


def test_a_cuda_graph_captures_forward_and_backward():
    case = CASES[4]
    leaves, dout, cu = _inputs(case)

    def step():
        return _run(
            lambda q, k, v: moba_attention(q, k, v, block_size=48, topk=4, cu_seqlens=cu, backend="triton"),
            leaves,
            dout,
        )

    expected = step()
    for name, a, b in zip(NAMES, captured(step)(), expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("routing", ["uniform", "sink"])
def test_a_million_tokens_do_not_overflow(routing):
    """q has 2^31 elements and the partials ten times as many; sampled queries and keys are exact."""
    from eval.bench.check import check
    from eval.bench.inputs import make_inputs
    from eval.bench.shapes import Shape

    check(make_inputs(Shape(1 << 20, 16, 4, 128, 512, 4), 1, routing, dtype=torch.bfloat16))


def test_auto_takes_these_kernels():
    leaves, _, cu = _inputs(CASES[0])
    outs = [moba_attention(*leaves, block_size=128, topk=8, cu_seqlens=cu, backend=b) for b in ("auto", "triton")]
    assert torch.equal(*outs)
