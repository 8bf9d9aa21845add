"""The oracle itself against a plain Python loop over queries, and against what attention must be at its limits."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.moba.reference import reference_attend, reference_attention, reference_choose
from tests.model.moba.cases import borders, make_qkv, run
from tests.tolerances import assert_close


def by_loop(q: Tensor, k: Tensor, v: Tensor, size: int, topk: int, lengths: list[int]) -> tuple[Tensor, list[set]]:
    """MoBA in Python numbers: one query, one head, one block at a time."""
    out, chosen, base, first = torch.zeros_like(q), [], 0, 0
    group = q.shape[1] // k.shape[1]
    for length in lengths:
        for i in range(length):
            own = i // size
            for h in range(q.shape[1]):
                query = q[base + i, h]
                keys, values = k[base : base + length, h // group], v[base : base + length, h // group]
                scores = [float(query @ keys[b * size : (b + 1) * size].mean(0)) for b in range(own)]
                best = sorted(range(own), key=lambda b: (-scores[b], b))[: topk - 1]
                seen = [j for b in best for j in range(b * size, (b + 1) * size)] + list(range(own * size, i + 1))
                weight = [math.exp(float(query @ keys[j]) / math.sqrt(q.shape[2])) for j in seen]
                out[base + i, h] = sum(w * values[j] for w, j in zip(weight, seen, strict=True)) / sum(weight)
                chosen.append({first + b for b in best})
        base, first = base + length, first + math.ceil(length / size)
    return out, chosen


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("topk", [1, 2, 3, 9])
def test_equals_the_loop(heads: int, kv_heads: int, topk: int) -> None:
    lengths, size = [1, 3, 4, 5, 11], 4
    q, k, v = make_qkv(sum(lengths), heads, kv_heads, 4, dtype=torch.float64)
    out, chosen = by_loop(q, k, v, size, topk, lengths)
    options = {"block_size": size, "topk": topk, "cu_seqlens": borders(lengths)}
    assert_close(reference_attention(q, k, v, **options), out, "out")
    ids = reference_choose(q, k, **options)
    assert ids.shape == (sum(lengths), heads, topk - 1) and ids.dtype == torch.int32
    assert [set(row) - {-1} for row in ids.flatten(0, 1).tolist()] == chosen


def test_ties_go_to_the_lowest_block() -> None:
    q, k = torch.ones(40, 1, 2), torch.ones(40, 1, 2)
    assert reference_choose(q, k, block_size=8, topk=3)[39, 0].tolist() == [0, 1]


def test_log_sum_exp_and_given_blocks() -> None:
    q, k, v = make_qkv(12, 1, 1, 4, dtype=torch.float64)
    ids = torch.full((12, 1, 2), -1, dtype=torch.int32)
    ids[8:, 0, 1] = 0  # the last block also reads the first, and skips the second
    out, lse = reference_attend(q, k, v, ids, block_size=4)
    score = (q[11, 0] @ k[[0, 1, 2, 3, 8, 9, 10, 11], 0].T) / 2
    assert_close(lse[11, 0], score.exp().sum().log(), "lse")
    assert_close(out[11, 0], score.softmax(0) @ v[[0, 1, 2, 3, 8, 9, 10, 11], 0], "out")


def test_all_blocks_is_full_causal_attention() -> None:
    qkv = make_qkv(50, 4, 2, dtype=torch.float64)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(0, 1), *(x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)

    actual = run(lambda q, k, v: reference_attention(q, k, v, block_size=8, topk=7), qkv)
    for x, y in zip(actual, run(dense, qkv), strict=True):
        assert_close(x, y, "all blocks")


def test_the_future_changes_no_bit() -> None:
    q, k, v = make_qkv(70, 2, 1)
    before = reference_attention(q, k, v, block_size=16, topk=2)
    for x in (q, k, v):
        x[41:] = 7 * torch.randn_like(x[41:])
    after = reference_attention(q, k, v, block_size=16, topk=2)
    assert torch.equal(before[:41], after[:41]) and not torch.equal(before[41:], after[41:])


def test_half_precision_is_computed_in_fp32() -> None:
    qkv = make_qkv(40, 2, 1)
    low = [x.bfloat16() for x in qkv]
    out = reference_attention(*low, block_size=16, topk=2)
    exact = reference_attention(*(x.double() for x in low), block_size=16, topk=2)
    assert out.dtype == torch.bfloat16
    assert_close(out, exact, "one rounding", 2**-8)
