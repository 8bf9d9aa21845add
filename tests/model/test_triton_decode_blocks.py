"""MoBA's decode kernel against softmax over the listed tokens, in Triton's interpreter; compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model.moba.conftest import nan_memory  # noqa: F401
from tests.tolerances import assert_close

triton = pytest.importorskip("triton")
from model.moba import triton_common  # noqa: E402
from model.triton_decode import Split  # noqa: E402
from model.triton_decode_blocks import attend  # noqa: E402
from tests.model.test_triton_decode import inputs, interpreted  # noqa: E402


def listed(last: list[int], heads: int, block_size: int, slots: int) -> Tensor:
    """The own block first, then past blocks at random, each head its own; -1 where there are too few."""
    g = torch.Generator().manual_seed(1)
    ids = torch.full((len(last), heads, slots), -1, dtype=torch.int32)
    for row, end in enumerate(last):
        own = end // block_size
        for head in range(heads):
            past = torch.randperm(own, generator=g)[: slots - 1].int()
            ids[row, head, : 1 + past.numel()] = torch.cat([torch.tensor([own], dtype=torch.int32), past])
    return ids


def oracle(q: Tensor, k: Tensor, v: Tensor, last: list[int], ids: Tensor, block_size: int) -> Tensor:
    group = q.shape[1] // k.shape[2]
    out = torch.empty(q.shape, dtype=torch.float64)
    for row, end in enumerate(last):
        for head in range(q.shape[1]):
            mine = [b for b in ids[row, head].tolist() if b >= 0]
            tokens = [t for b in mine for t in range(b * block_size, min((b + 1) * block_size, end + 1))]
            keys, values = (x[row, tokens, head // group].double() for x in (k, v))
            p = torch.softmax(keys @ q[row, head].double() * q.shape[-1] ** -0.5, 0)
            out[row, head] = p @ values
    return out


@interpreted
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("programs", [1, 3, 40])
@pytest.mark.parametrize(
    ("last", "heads", "kv_heads", "block_size", "slots"),
    [
        ([70], 4, 2, 16, 3),
        ([5, 15, 16, 199], 4, 1, 16, 4),  # rows without past blocks, and both sides of a border
        ([130, 47], 6, 2, 48, 2),  # a block that is no power of two
        ([63], 2, 2, 16, 9),  # more slots than blocks
        ([99], 2, 1, 32, 1),  # the own block only
    ],
)
def test_matches_the_oracle(
    last: list[int], heads: int, kv_heads: int, block_size: int, slots: int, programs: int
) -> None:
    q, k, v = inputs(len(last), max(last) + 3, heads, kv_heads, 16)
    for row, end in enumerate(last):  # behind the row's last token nothing is read
        k[row, end + 1 :] = v[row, end + 1 :] = float("nan")
    ids = listed(last, heads, block_size, slots)
    tile = Split(keys=16, warps=4, stages=1, programs=programs)
    out = attend(q, k, v, torch.tensor(last), ids, block_size, tile=tile)
    assert_close(out, oracle(q, k, v, last, ids, block_size), "out")


@interpreted
@pytest.mark.usefixtures("nan_memory")
def test_what_heads_share_and_what_they_do_not() -> None:
    """Lists that are equal, overlap in part and not at all; keys of blocks nobody chose are never read."""
    q, k, v = inputs(1, 400, 16, 2, 16)
    ids = torch.tensor(
        [[24, 3, 7]] * 8 + [[24, 1 + h, 10 - h] for h in range(4)] + [[24, 11 + h, -1] for h in range(4)]
    )
    ids = ids.int()[None]
    for block in range(15, 24):
        k[:, block * 16 : block * 16 + 16] = v[:, block * 16 : block * 16 + 16] = float("nan")
    out = attend(q, k, v, torch.tensor([391]), ids, 16, tile=Split(keys=16, warps=4, stages=1, programs=3))
    assert_close(out, oracle(q, k, v, [391], ids, 16), "out")


@interpreted
def test_the_scale_is_used() -> None:
    q, k, v = inputs(1, 80, 4, 2, 16)
    ids, place = listed([70], 4, 16, 3), torch.tensor([70])
    scaled = attend(q, k, v, place, ids, 16, softmax_scale=0.125)
    assert_close(scaled, oracle(q * 0.5, k, v, [70], ids, 16), "out")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("last", "block_size", "slots"), [([40_000], 4096, 4), ([0, 5000, 8191, 63], 48, 12)])
def test_gpu(last: list[int], block_size: int, slots: int, dim: int) -> None:
    assert not triton_common.INTERPRETED
    q, k, v = (x.to("cuda", torch.bfloat16) for x in inputs(len(last), max(last) + 9, 32, 8, dim))
    ids, place = listed(last, 32, block_size, slots), torch.tensor(last, device="cuda")
    out = attend(q, k, v, place, ids.cuda(), block_size)
    assert_close(out.cpu(), oracle(q.cpu(), k.cpu(), v.cpu(), last, ids, block_size), "out")
    assert all(torch.equal(out, attend(q, k, v, place, ids.cuda(), block_size)) for _ in range(3))
