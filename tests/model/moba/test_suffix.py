"""Last queries of longer rows: the same values as attention over the whole rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from model.full import full_attention
from model.moba import attend_blocks
from model.moba.blocks import build_block_table
from model.moba.choosers import choose
from model.moba.suffix import choose_suffix, suffix_attention
from model.schedule import CHOOSERS, FULL, LayerPlan

BLOCK = 16
KEYS = [70, 5, 96, 33]
CHUNKS = {
    "decode": [1, 1, 1, 1],
    "chunk": [21, 3, 40, 2],  # a block border inside, all in one block, several blocks, behind a border
    "all": KEYS,
    "uneven": [1, 5, 64, 33],
}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(KEYS), 4, 16, generator=generator, dtype=dtype)
    k, v = (torch.randn(sum(KEYS), 2, 16, generator=generator, dtype=dtype) for _ in range(2))
    return q, k, v


def last(lengths: list[int]) -> Tensor:
    ends = list(itertools.accumulate(KEYS))
    return torch.cat([torch.arange(end - m, end) for end, m in zip(ends, lengths, strict=True)])


@pytest.mark.parametrize("lengths", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("topk", [1, 2, 3, 99])
@pytest.mark.parametrize("name", ["full", *CHOOSERS])
def test_values_of_the_whole_row(name: str, topk: int, lengths: list[int]) -> None:
    if name == "sink_window" and topk == 1:
        return  # has no room for the sink
    q, k, v = inputs()
    borders = torch.tensor([0, *KEYS]).cumsum(0).int()
    if name == "full":
        plan, whole = FULL, full_attention(q, k, v, cu_seqlens=borders, max_seqlen=max(KEYS))
    else:
        plan = LayerPlan("moba", BLOCK, topk, name)
        ids = choose(name, q, k, block_size=BLOCK, topk=topk, cu_seqlens=borders)
        whole = attend_blocks(q, k, v, ids, block_size=BLOCK, cu_seqlens=borders, backend="reference")
    place = last(lengths)
    out = suffix_attention(q[place], k, v, query_lengths=lengths, key_lengths=KEYS, layer_plan=plan)
    torch.testing.assert_close(out, whole[place], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", CHOOSERS)
def test_choices_of_the_whole_row(name: str) -> None:
    q, k, _ = inputs()
    borders = torch.tensor([0, *KEYS]).cumsum(0).int()
    place = last(CHUNKS["chunk"])
    whole = choose(name, q, k, block_size=BLOCK, topk=3, cu_seqlens=borders)[place]
    table = build_block_table(borders, sum(KEYS), BLOCK)
    ids = choose_suffix(name, q[place], k, place, table, 2)
    assert ids.dtype == torch.int32
    assert torch.equal(ids.sort(-1).values, whole.sort(-1).values)


def test_full_attention_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    lengths = CHUNKS["chunk"]
    rows = {"query_lengths": lengths, "key_lengths": KEYS, "layer_plan": FULL}
    whole = suffix_attention(q[last(lengths)], k, v, **rows)  # type: ignore[arg-type]
    monkeypatch.setattr("model.moba.suffix.MASK_BYTES", 4 * 4 * 96 * 7)  # seven queries at a time
    pieces = suffix_attention(q[last(lengths)], k, v, **rows)  # type: ignore[arg-type]
    torch.testing.assert_close(pieces, whole, atol=1e-12, rtol=0)


def test_the_scale_is_used() -> None:
    q, k, v = inputs()
    for plan in (FULL, LayerPlan("moba", BLOCK, 2)):
        for lengths in (CHUNKS["decode"], CHUNKS["chunk"]):
            rows = {"query_lengths": lengths, "key_lengths": KEYS, "layer_plan": plan}
            plain = suffix_attention(q[last(lengths)] * 0.5, k, v, **rows)  # type: ignore[arg-type]
            scaled = suffix_attention(q[last(lengths)], k, v, softmax_scale=0.125, **rows)  # type: ignore[arg-type]
            torch.testing.assert_close(scaled, plain, atol=1e-12, rtol=0)


def test_lengths_that_do_not_fit() -> None:
    q, k, v = inputs()
    with pytest.raises(UserError, match="do not fit key lengths"):
        suffix_attention(q[:6], k[:5], v[:5], query_lengths=[6], key_lengths=[5], layer_plan=FULL)
    with pytest.raises(UserError, match="4 queries, 5 keys"):
        suffix_attention(q[:4], k[:5], v[:5], query_lengths=[3], key_lengths=[5], layer_plan=FULL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("plan", [FULL, LayerPlan("moba", BLOCK, 3)], ids=["full", "moba"])
def test_gpu_equals_cpu(plan: LayerPlan, lengths: list[int]) -> None:
    q, k, v = (x.to(torch.bfloat16) for x in inputs())
    q = q[last(lengths)]
    rows = {"query_lengths": lengths, "key_lengths": KEYS, "layer_plan": plan}
    expected = suffix_attention(q.double(), k.double(), v.double(), **rows)  # type: ignore[arg-type]
    out = suffix_attention(q.cuda(), k.cuda(), v.cuda(), **rows)  # type: ignore[arg-type]
    torch.testing.assert_close(out.cpu().double(), expected, atol=2e-2, rtol=2e-2)
