"""MoBA's gate while decoding, against a stable sort of the scores, in Triton's interpreter; compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model.moba.conftest import nan_memory  # noqa: F401

triton = pytest.importorskip("triton")
from model.moba import triton_common  # noqa: E402
from model.triton_decode_choice import choose  # noqa: E402
from tests.model.test_triton_decode import interpreted  # noqa: E402


def inputs(last: list[int], heads: int, kv_heads: int, dim: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and means whose products are exact in fp32: small whole numbers."""
    g = torch.Generator().manual_seed(0)
    blocks = max(end // size for end in last)
    q = torch.randint(-4, 5, (len(last), heads, dim), generator=g).float()
    room = torch.randint(-4, 5, (len(last), blocks + 2, kv_heads, dim), generator=g).float()
    return q, room[:, :blocks], torch.tensor(last)


def oracle(q: Tensor, means: Tensor, last: list[int], size: int, topk: int) -> Tensor:
    group = q.shape[1] // means.shape[2]
    ids = torch.full((*q.shape[:2], topk), -1, dtype=torch.int32)
    for row, end in enumerate(last):
        own = end // size
        scores = torch.einsum("hd,nhd->hn", q[row].double(), means[row, :own].repeat_interleave(group, 1).double())
        past = scores.sort(dim=-1, descending=True, stable=True).indices[:, : topk - 1]
        ids[row, :, 0] = own
        ids[row, :, 1 : 1 + past.shape[1]] = past.int()
    return ids


@interpreted
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(
    ("last", "heads", "kv_heads", "topk"),
    [
        ([700], 4, 2, 3),  # many equal scores: whole numbers
        ([40, 15, 16, 1200], 4, 1, 5),  # a row without a past, rows with fewer blocks than slots
        ([160], 3, 3, 30),
        ([600, 599], 16, 1, 1),  # the own block only
    ],
)
def test_matches_a_stable_sort(last: list[int], heads: int, kv_heads: int, topk: int) -> None:
    q, means, place = inputs(last, heads, kv_heads, 16, 16)
    for row, end in enumerate(last):  # what is not past is not looked at
        means[row, end // 16 :] = float("nan")
    assert torch.equal(choose(q, means, place, 16, topk), oracle(q, means, last, 16, topk))


@interpreted
def test_of_equal_scores_the_lowest_block_wins() -> None:
    q, means = torch.ones(1, 2, 16), torch.ones(1, 40, 1, 16)
    ids = choose(q, means, torch.tensor([645]), 16, 4)
    assert ids.tolist() == [[[40, 0, 1, 2]] * 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("last", "size", "topk"), [([131_000], 4096, 12), ([131_000, 70, 9000], 128, 8)])
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu(last: list[int], size: int, topk: int, dim: int) -> None:
    assert not triton_common.INTERPRETED
    q, means, place = (x.cuda() for x in inputs(last, 32, 8, dim, size))
    ids = choose(q.bfloat16(), means, place, size, topk)
    assert torch.equal(ids.cpu(), oracle(q.cpu(), means.cpu(), last, size, topk))
