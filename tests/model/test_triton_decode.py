"""The decode kernels against softmax written out, in Triton's interpreter; compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eval.bench.timing import captured
from tests.model.moba.conftest import nan_memory  # noqa: F401
from tests.tolerances import assert_close

triton = pytest.importorskip("triton")
from model.moba import triton_common  # noqa: E402
from model.triton_decode import Split, attend, num_splits  # noqa: E402

SMALL = Split(keys=16, warps=4, stages=1, programs=3)


def oracle(q_RHD: Tensor, k_RLHD: Tensor, v_RLHD: Tensor, last: list[int]) -> Tensor:
    """Row by row in float64."""
    group = q_RHD.shape[1] // k_RLHD.shape[2]
    rows = []
    for q, k, v, end in zip(q_RHD.double(), k_RLHD.double(), v_RLHD.double(), last, strict=True):
        k, v = (x[: end + 1].repeat_interleave(group, 1) for x in (k, v))
        p = torch.softmax(torch.einsum("hd,lhd->hl", q, k) * q.shape[-1] ** -0.5, -1)
        rows.append(torch.einsum("hl,lhd->hd", p, v))
    return torch.stack(rows)


def inputs(rows: int, capacity: int, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(rows, heads, dim, generator=g)
    k, v = (torch.randn(rows, capacity, kv_heads, dim, generator=g) for _ in range(2))
    return q, k, v


interpreted = pytest.mark.skipif(not triton_common.INTERPRETED, reason="the kernels of this process are compiled")


@interpreted
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("programs", [1, 3, 40])
@pytest.mark.parametrize(
    ("last", "capacity", "heads", "kv_heads"),
    [
        ([0, 1, 15, 16, 17], 20, 4, 2),  # a single key, and both sides of a step
        ([199, 63, 128], 200, 4, 1),  # many splits, some of them without a key in short rows
        ([70], 96, 6, 2),  # three query heads per key head
        ([90, 5], 100, 3, 3),  # no groups
        ([40], 64, 16, 1),
    ],
)
def test_matches_the_oracle(last: list[int], capacity: int, heads: int, kv_heads: int, programs: int) -> None:
    q, k, v = inputs(len(last), capacity, heads, kv_heads, 16)
    for row, end in enumerate(last):  # behind the row's last token nothing is read
        k[row, end + 1 :] = v[row, end + 1 :] = float("nan")
    tile = Split(keys=16, warps=4, stages=1, programs=programs)
    out = attend(q, k, v, torch.tensor(last), tile=tile)
    assert_close(out, oracle(q, k, v, last), "out")


@interpreted
def test_some_rows_of_a_cache_and_a_scale() -> None:
    q, k, v = inputs(4, 50, 4, 2, 16)
    out = attend(q[1:3], k[1:3], v[1:3], torch.tensor([30, 49]), tile=SMALL, softmax_scale=0.125)
    assert_close(out, oracle(q[1:3] * 0.5, k[1:3], v[1:3], [30, 49]), "out")


@interpreted
def test_too_many_heads_in_a_group() -> None:
    q, k, v = inputs(1, 20, 17, 1, 16)
    with pytest.raises(ValueError, match="17 query heads per key head"):
        attend(q, k, v, torch.tensor([3]))


def test_splits_fill_the_gpu_and_stay_long_enough() -> None:
    tile = Split(keys=64, warps=4, stages=3, programs=4)
    assert num_splits(8, 131_072, 132, tile) == 66
    assert num_splits(8, 1 << 20, 132, tile) == 66
    assert num_splits(64, 131_072, 132, tile) == 9
    assert num_splits(8, 300, 132, tile) == 2
    assert num_splits(1, 1 << 20, 132, tile) == 128
    assert num_splits(1000, 64, 132, tile) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("last", "capacity"), [([131_071], 131_072), ([0, 5000, 8191, 63], 9000)])
def test_gpu(last: list[int], capacity: int, dim: int) -> None:
    q, k, v = (x.to("cuda", torch.bfloat16) for x in inputs(len(last), capacity, 32, 8, dim))
    place = torch.tensor(last, device="cuda")
    out = attend(q, k, v, place)
    assert_close(out.cpu(), oracle(q.cpu(), k.cpu(), v.cpu(), last), "out")
    assert all(torch.equal(out, attend(q, k, v, place)) for _ in range(3))
    grown = place.clone()
    replay = captured(lambda: attend(q, k, v, grown))
    grown.copy_(torch.tensor([max(0, end - 40) for end in last]))
    assert torch.equal(replay(), attend(q, k, v, grown))
