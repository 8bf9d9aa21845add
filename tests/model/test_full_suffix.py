"""Attention of the last tokens in two parts: the merge on a CPU, cuDNN's kernels on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import full_suffix
from model.full_suffix import attend_row, refusal
from tests.tolerances import assert_close


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse in the dtype given; a causal mask aligned to the first key."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = torch.einsum("mhd,nhd->mhn", q, k) * scale
    if causal:
        hidden = torch.arange(k.shape[0], device=q.device) > torch.arange(q.shape[0], device=q.device)[:, None]
        score = score.masked_fill(hidden[:, None], float("-inf"))
    return torch.einsum("mhn,nhd->mhd", score.softmax(-1), v), score.logsumexp(-1)


def inputs(keys: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(keys, heads, dim, generator=g, dtype=torch.float64) for heads in (8, 2, 2))
    return q * 3, k, v  # sharp enough that the weights of the parts differ


@pytest.mark.parametrize("queries", [1, 7, 39, 40])
def test_parts_merge_to_the_whole(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_suffix, "_piece", exact)
    q, k, v = inputs(40, 16)
    whole = exact(q, k, v, True, 0.3)[0][-queries:]
    assert_close(attend_row(q[-queries:], k, v, 0.3), whole, "out")


def test_a_cpu_is_refused_with_a_reason() -> None:
    assert "half precision on a GPU" in (refusal(inputs(4, 16)[0]) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("keys", "queries"), [(4096, 4096), (4096, 2048), (5003, 1025)])
def test_gpu(keys: int, queries: int, dim: int) -> None:
    q, k, v = (x.to("cuda", torch.bfloat16) for x in inputs(keys, dim))
    assert refusal(q) is None
    whole = exact(q.float(), k.float(), v.float(), True, dim**-0.5)[0][-queries:]
    assert_close(attend_row(q[-queries:], k, v, dim**-0.5), whole, "out")
