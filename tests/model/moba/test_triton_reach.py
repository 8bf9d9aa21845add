"""Queries that choose all of their past run without lists, with the same values and gradients."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
from model.moba import triton_common
from model.moba.blocks import build_block_table
from model.moba.reference import reference_attend
from model.moba.triton_gate import choose
from model.moba.triton_op import attend
from model.moba.triton_reach import build_reach, seldom
from tests.model.moba.cases import NAMES, borders, make_qkv, run
from tests.tolerances import assert_close

interpreted = pytest.mark.skipif(not triton_common.INTERPRETED, reason="the kernels of this process are compiled")

# lengths, heads, kv_heads, dim, block_size, topk
CASES = {
    "one document": ([150], 2, 1, 32, 16, 4),
    "documents of no, some and many more blocks than topk": ([1, 39, 16, 70, 33], 2, 1, 16, 16, 3),
    "blocks of several tiles": ([280], 2, 1, 32, 64, 3),
    "blocks that one tile covers, the fused backward": ([130, 70], 2, 2, 16, 32, 2),
}


@interpreted
@pytest.mark.parametrize("past", [0, 2, 9])
def test_reach_of_every_query_and_block(past):
    lengths, size = [1, 39, 16, 100, 33], 16
    table = build_block_table(borders(lengths), sum(lengths), size)
    reach = build_reach(table, past)
    start, end = [], torch.zeros_like(table.block_start)
    for length, first in zip(lengths, borders(lengths).tolist(), strict=False):
        for i in range(length):
            start.append(~first if i // size <= past else first + i // size * size)
        for b in range(-(-length // size)):
            last = past + 1 if b <= past else b + 1
            end[table.own_block[first] + b] = first + min(length, last * size)
    used = table.block_len > 0
    assert reach.start.tolist() == start
    assert torch.equal(reach.end[used], end[used])


@interpreted
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(name, budget):
    lengths, heads, kv_heads, dim, block_size, topk = CASES[name]
    cu, qkv = borders(lengths), make_qkv(sum(lengths), heads, kv_heads, dim)
    table = dataclasses.replace(build_block_table(cu, sum(lengths), block_size), complete_past=topk - 1)
    ids = choose(*qkv[:2], table, topk - 1)
    expected = run(lambda q, k, v: reference_attend(q, k, v, ids, block_size=block_size, cu_seqlens=cu)[0], qkv)
    actual = run(lambda q, k, v: attend(q, k, v, ids, table, dim**-0.5, budget=budget), qkv)
    for label, a, e in zip(NAMES, actual, expected, strict=True):
        assert_close(a, e, label)


GPU_CASES = [
    ([4096], 8, 2, 128, 512, 5),
    ([4096], 8, 2, 128, 128, 9),
    ([3000], 8, 2, 128, 1024, 2),
    ([2048], 8, 1, 64, 512, 3),
    ([1, 699, 600, 1700], 8, 2, 64, 128, 4),
    ([1, 699, 600, 1700], 8, 2, 128, 48, 4),
    ([1000, 1, 1048], 4, 4, 128, 16, 12),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu(case):
    """As near to the oracle as with lists; three runs and every budget give equal bits."""
    lengths, heads, kv_heads, dim, block_size, topk = case
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn((sum(lengths), h, dim), device="cuda", dtype=torch.bfloat16, generator=g)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    leaves, cu = tuple(x.requires_grad_() for x in (q, k, v)), borders(lengths).cuda()
    table = build_block_table(cu, sum(lengths), block_size)
    ids = choose(q.detach(), k.detach(), table, topk - 1)

    def once(past, budget=None):
        known = dataclasses.replace(table, complete_past=past)
        out = attend(*leaves, ids, known, dim**-0.5, budget=budget)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    wide = tuple(x.detach().float().requires_grad_() for x in leaves)
    exact = reference_attend(*wide, ids, block_size=block_size, cu_seqlens=cu)[0]
    exact = (exact.detach(), *torch.autograd.grad(exact, wide, dout.float()))
    listed, first = once(0), once(topk - 1)
    for label, a, b, e in zip(NAMES, first, listed, exact, strict=True):
        error, allowed = (float((x.float() - e).norm() / e.norm()) for x in (a, b))
        assert error <= 1.2 * allowed, f"{label}: {error:.2e}, with lists {allowed:.2e}"
    for other in (once(topk - 1), once(topk - 1), once(topk - 1, budget=1)):
        for label, a, b in zip(NAMES, first, other, strict=True):
            assert torch.equal(a, b), label


@pytest.mark.parametrize(
    ("lengths", "size", "past", "few"),
    [
        ([8192], 512, 7, False),
        ([16384], 512, 7, True),
        ([32768], 512, 7, True),
        ([4096] * 8, 512, 7, False),
        ([32768], 128, 7, False),
        ([32768], 512, 0, True),
    ],
)
def test_queries_without_lists_are_seldom_in_long_documents(lengths, size, past, few):
    table = build_block_table(borders(lengths), sum(lengths), size)
    assert seldom(dataclasses.replace(table, complete_past=past)) is few
