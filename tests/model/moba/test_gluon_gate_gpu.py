"""The specialised gate on a Hopper GPU: the same blocks as its Triton twin, bit for bit."""

import pytest
import torch

pytest.importorskip("triton")
from model.moba import hopper
from model.moba.blocks import build_block_table
from model.moba.triton_gate import choose
from tests.model.moba.cases import borders

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(hopper._unusable() is not None, reason=str(hopper._unusable())),
]
PACKED = [100, 5000, 63, 64, 65, 1, 9000, 20000]
# lengths, heads, key heads, head_dim, past blocks, kind of scores; blocks of 64
CASES = [
    ([16384], 32, 8, 128, 7, "random"),
    ([16300], 8, 8, 128, 7, "random"),
    ([16384], 6, 2, 128, 3, "random"),
    ([16384], 8, 1, 64, 2, "random"),
    ([16384], 8, 2, 128, 16, "random"),
    ([16384], 8, 2, 128, 1, "random"),
    (PACKED, 8, 2, 128, 7, "random"),
    (PACKED, 8, 2, 64, 3, "few values"),
    ([16384], 8, 2, 128, 7, "few values"),
    ([16384], 8, 2, 128, 7, "equal"),
    ([16384], 8, 2, 128, 7, "equal, negative"),
    ([16384], 8, 2, 128, 7, "rising"),
    ([16384], 8, 2, 128, 7, "not a number"),
    ([262144], 4, 1, 128, 7, "random"),  # lists are made several times
    ([262144], 4, 1, 128, 11, "few values"),
]


def _queries_and_keys(tokens, heads, kv_heads, dim, kind):
    g = torch.Generator("cuda").manual_seed(tokens)
    q = torch.randn(tokens, heads, dim, device="cuda", generator=g).bfloat16()
    k = torch.randn(tokens, kv_heads, dim, device="cuda", generator=g).bfloat16()
    if kind == "few values":
        q = torch.randint(-2, 3, q.shape, device="cuda", generator=g).bfloat16()
        k = torch.randint(-1, 2, (tokens, kv_heads, 1), device="cuda", generator=g).bfloat16().expand_as(k)
    if kind.startswith("equal"):
        q, k = torch.ones_like(q), torch.full_like(k, -1.0 if "negative" in kind else 1.0)
    if kind == "rising":
        q, k = (
            torch.ones_like(q),
            (torch.arange(tokens, device="cuda") / tokens).bfloat16()[:, None, None].expand_as(k),
        )
    if kind == "not a number":
        k[64 * 20 : 64 * 21] = torch.nan
        k[64 * 90 : 64 * 91] = torch.inf
    return q.contiguous(), k.contiguous()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_blocks_as_the_twin(case):
    lengths, heads, kv_heads, dim, past, kind = case
    tokens = sum(lengths)
    q, k = _queries_and_keys(tokens, heads, kv_heads, dim, kind)
    table = build_block_table(borders(lengths).cuda(), tokens, 64)
    assert hopper.gate_refusal(dim, table.block_start.numel(), past) is None
    ids = choose(q, k, table, past).sort(-1).values
    with hopper.twins_only():
        expected = choose(q, k, table, past).sort(-1).values
    assert torch.equal(ids, expected)
    if kind == "not a number":  # such a block is never chosen, and no other one twice
        real = ids >= 0
        assert not ((ids == 20) | (ids == 90)).any()
        assert not ((ids[..., 1:] == ids[..., :-1]) & real[..., 1:]).any()
        assert (real.sum(-1) >= torch.clamp(table.own_block[:, None] - 2, 0, past)).all()
    assert torch.equal(choose(q, k, table, past).sort(-1).values, ids)
